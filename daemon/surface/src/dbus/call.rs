//! What is a method call, and how is it answered? With values, or with an error that has a name.

use super::interface::NAME;
use crate::refusal::Refusal;
use serde::Serialize;
use sparsed_engine::api::Owner;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use zbus::Message;
use zbus::message::Flags;
use zbus::names::OwnedUniqueName;
use zbus::wire::{DynamicDeserialize, DynamicType};

/// A call whose caller is known.
#[derive(Debug)]
pub(super) struct Call {
    message: Message,
    /// The caller's connection.
    pub(super) sender: OwnedUniqueName,
    /// The user behind it.
    pub(super) uid: u32,
}

/// A reply, and what begins once it is sent.
pub(super) struct Outcome {
    pub(super) reply: Message,
    pub(super) after: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Why a call has no values to give back.
#[derive(Debug)]
pub(super) enum CallError {
    /// What every door refuses alike.
    Refused(Refusal),
    /// What is wrong with the call as such, by its name below `org.freedesktop.DBus.Error`.
    Standard(&'static str, String),
}

impl Call {
    pub(super) fn new(message: Message, sender: OwnedUniqueName, uid: u32) -> Self {
        Self { message, sender, uid }
    }

    /// Whose sessions and requests these are.
    pub(super) fn owner(&self) -> Owner {
        Owner::Uid(self.uid)
    }

    /// Whether the caller waits while somebody is asked for a password.
    pub(super) fn may_ask_user(&self) -> bool {
        self.message.primary_header().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH)
    }

    /// Its arguments.
    ///
    /// # Errors
    /// Other ones than `T` has.
    pub(super) fn arguments<T: for<'body> DynamicDeserialize<'body>>(&self) -> Result<T, CallError> {
        self.message.body().deserialize().map_err(|error| CallError::Standard("InvalidArgs", error.to_string()))
    }

    /// A reply that carries `values`.
    ///
    /// # Errors
    /// Values that cannot be sent: descriptors that cannot be duplicated, for want of them.
    pub(super) fn answer<T: Serialize + DynamicType>(&self, values: &T) -> Result<Outcome, CallError> {
        let reply = Message::method_return(&self.message.header()).build(values);
        let reply = reply.map_err(|error| CallError::Standard("Failed", error.to_string()))?;
        Ok(Outcome { reply, after: None })
    }
}

impl Outcome {
    /// The same, followed by `after`.
    pub(super) fn then(self, after: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { after: Some(Box::pin(after)), ..self }
    }
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcome").field("reply", &self.reply).field("goes_on", &self.after.is_some()).finish()
    }
}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => f.write_str(refusal.message()),
            Self::Standard(_, message) => f.write_str(message),
        }
    }
}

impl CallError {
    /// The caller, or all together, do too much at a time.
    pub(super) fn limit(message: impl Into<String>) -> Self {
        Self::Standard("LimitsExceeded", message.into())
    }

    /// As [`Self::limit`], where the system has no more of something.
    pub(super) fn system(error: &std::io::Error) -> Self {
        Self::limit(format!("no answer can be carried now: {error}"))
    }

    /// The error that goes back: HTTP's code is its name, and its body the message alone. GLib shows no message of an
    /// error that carries more.
    ///
    /// # Errors
    /// A message that cannot be built.
    pub(super) fn reply(&self, to: &Message) -> zbus::Result<Message> {
        match self {
            Self::Refused(refusal) => {
                let name = format!("{NAME}.Error.{}", refusal.camel_code());
                Message::error(&to.header(), name.as_str()).build(&(refusal.message(),))
            }
            Self::Standard(name, message) => {
                let name = format!("org.freedesktop.DBus.Error.{name}");
                Message::error(&to.header(), name.as_str()).build(&(message,))
            }
        }
    }
}
