pub(crate) mod images;
pub mod prove;
pub(crate) mod searched;
pub(crate) mod waits;
