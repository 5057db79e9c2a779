//! How much memory may be used, and what is to be done when there is less? Values only: no clock, no file, no device.

mod budget;
mod pressure;
mod thrash;

pub use budget::{Bound, Budget, Limit};
pub(crate) use pressure::Ladder;
pub use pressure::{Outlook, Pressure, Stage};
pub(crate) use thrash::Thrash;
