pub mod images;
pub mod prove;
pub mod searched;
pub mod waits;
