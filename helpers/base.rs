//! Types, the root that reads go through, programs, logging and progress.

pub mod clock;
pub mod log;
pub mod program;
pub mod progress;
pub mod refusal;
pub mod root;
pub mod types;
