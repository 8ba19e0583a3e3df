//! Refusals: errors after which nothing was written.

use std::fmt;

use crate::base::fault::{Code, Fault};
use crate::base::types::DiskName;

/// An error before anything was written, because a precondition is not met. It makes exit status 3.
#[derive(Debug)]
pub struct Refused {
    sentence: String,
    /// The fault by which programs recognise it.
    fault: Option<Fault>,
}

impl Refused {
    /// The fault that caused it, if that has a number.
    pub fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// Whether the reason is that another disk may be newer than the booted one.
    pub fn is_about_age(&self) -> bool {
        self.fault.as_ref().is_some_and(|fault| fault.code == Code::F07)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Refused {}

/// A refusal with this sentence.
pub fn refused(sentence: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Refused { sentence: sentence.into(), fault: None })
}

/// Makes an error that occurred before anything was written a refusal.
pub fn nothing_done(error: anyhow::Error) -> anyhow::Error {
    match error.is::<Refused>() {
        true => error,
        false => refused(format!("{error:#}; nothing was done")),
    }
}

/// A refusal because a disk may be newer than the booted one. `disk` is the disk whose record shows this, or can't be read.
pub fn refused_for_age(disk: DiskName, sentence: impl Into<String>) -> anyhow::Error {
    let sentence = sentence.into();
    let fault = Fault::new(Code::F07, sentence.clone()).of(disk);
    anyhow::Error::new(Refused { sentence, fault: Some(fault) })
}
