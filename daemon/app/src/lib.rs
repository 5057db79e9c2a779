//! Who starts what, and when does it stop?
//!
//! The daemon `sparsed`: `config` says what is wanted, `assemble` puts it together, `lifecycle` runs and stops it,
//! `reload` changes it meanwhile, `watchdog` tells the service manager. The tool `sparsectl` (`ctl`) is a client of the
//! daemon's socket, and runs models by itself where no daemon is needed.
#![forbid(unsafe_code)]

mod absent;
mod additions;
pub mod assemble;
mod choice;
pub mod config;
pub mod ctl;
pub mod devices;
pub mod door;
pub mod lifecycle;
pub mod logging;
pub mod memory;
pub mod mqtt;
pub mod named;
mod private;
pub mod reload;
pub mod sessions;
mod state;
pub mod store;
pub mod tcp;
mod turned_away;
pub mod upstream;
pub mod watchdog;
