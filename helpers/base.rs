pub mod clock;
pub mod exit;
pub mod log;
pub mod program;
pub mod progress;
pub mod refusal;
pub mod root;
pub mod types;
