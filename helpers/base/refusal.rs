//! Refusals: errors after which nothing was written.

use std::fmt;

/// An error that means: nothing was written, because something is not as it has to be. It makes exit status 3.
#[derive(Debug)]
pub struct Refused {
    sentence: String,
    /// Whether that is which disk is the newer one.
    about_age: bool,
}

impl Refused {
    /// Whether it was refused because another disk may be newer than the one that is booted.
    pub fn is_about_age(&self) -> bool {
        self.about_age
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Refused {}

/// A refusal with its one sentence.
pub fn refused(sentence: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Refused { sentence: sentence.into(), about_age: false })
}

/// Whatever goes wrong before anything is written: a refusal, too.
pub fn nothing_done(error: anyhow::Error) -> anyhow::Error {
    match error.is::<Refused>() {
        true => error,
        false => refused(format!("{error:#}; nothing was done")),
    }
}

/// A refusal because another disk may be newer.
pub fn refused_for_age(sentence: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Refused { sentence: sentence.into(), about_age: true })
}
