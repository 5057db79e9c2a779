//! How does a model come in by a door? As an open file, for the store of whoever runs the doors.
//!
//! No verb of [`sparsed_engine::api`], though all else that can be asked is: the engine has no store, and hears of a
//! file when a model is loaded from it the next time. Nor have other doors it, since only D-Bus carries descriptors.

use std::fmt;
use std::fs::File;
use std::ops::ControlFlow;

/// Where models are kept.
pub trait ModelStore: fmt::Debug + Send + Sync {
    /// That a model may be called `name`, and that `sha256` can be one. Looks at no file.
    ///
    /// # Errors
    /// [`AddFailure::Invalid`].
    fn check(&self, name: &str, sha256: Option<&str>) -> Result<(), AddFailure>;

    /// Puts a model in, whole or not at all. Reads and writes as long as it takes: called on a thread of its own.
    /// `step` hears how far it is, a piece at a time, and may end it there.
    ///
    /// # Errors
    /// Why it is not there.
    fn add(&self, model: NewModel, step: &mut dyn FnMut(AddStep) -> ControlFlow<()>) -> Result<AddedModel, AddFailure>;
}

/// A model that is to be put into the store.
#[derive(Debug)]
pub struct NewModel {
    /// A GGUF. Whoever gave it may go on to write into it, and has it open at the same position.
    pub file: File,
    /// What is to stand for it.
    pub name: String,
    /// What its SHA-256 must be.
    pub sha256: Option<String>,
    /// Who gave it, for people.
    pub origin: String,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddStep {
    /// What is done with the bytes.
    pub stage: AddStage,
    /// Bytes with which it is done.
    pub done: u64,
    /// All of them.
    pub total: u64,
}

/// What is done with a model's bytes, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddStage {
    /// They are copied into the store's folder.
    Copying,
    /// The copy is read and hashed.
    Verifying,
}

/// A model that is in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedModel {
    /// What stands for it.
    pub name: String,
    /// Its content.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
    /// Models of the configuration that are this name's, by the names that requests use.
    pub served_as: Vec<String>,
    /// What is to be done to have it served, for people.
    pub next: String,
    /// Why this version cannot serve it, if so.
    pub not_served: Option<String>,
}

/// Why a model was not added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddFailure {
    /// An argument cannot be what it is.
    #[error("'{param}' {reason}")]
    Invalid {
        /// Which one.
        param: &'static str,
        /// What it must be.
        reason: String,
    },
    /// The file is too large.
    #[error("the file has {bytes} bytes, the limit is {limit} (models.max_bytes)")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The largest.
        limit: u64,
    },
    /// The disk has no room for it.
    #[error("{0}")]
    NoRoom(String),
    /// The file is not the one that it was at the beginning.
    #[error("the file is not taken: {0}")]
    Changed(String),
    /// The file is no GGUF, or a broken one.
    #[error("the file is no whole GGUF: {0}")]
    NoModel(String),
    /// It is another file than was said.
    #[error("the file's SHA-256 is {found}, not {wanted}")]
    OtherDigest {
        /// Its own.
        found: String,
        /// The one that was said.
        wanted: String,
    },
    /// As many as may be are being added.
    #[error("another model is being added; {limit} may be at a time")]
    Busy {
        /// How many may be.
        limit: usize,
    },
    /// Its caller wants it no more.
    #[error("the model is not wanted any more")]
    Stopped,
    /// The store cannot be written.
    #[error("the store of models: {0}")]
    Store(String),
}
