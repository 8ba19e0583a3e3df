//! Fuzz targets; what they do is in targets.rs, which tests/corpus.rs has, too.

pub mod targets;
