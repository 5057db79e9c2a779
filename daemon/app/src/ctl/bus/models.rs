//! How is a model put into the daemon's store over D-Bus? Its file goes as a descriptor, and lines of JSON come back.

use super::{Link, MANAGER, NAME, Pipe, ROOT, pipe_of, said};
use crate::store::Digest;
use anyhow::{Context, anyhow};
use futures_util::StreamExt;
use sparsed_surface::Bus;
use std::collections::HashMap;
use std::fs::File;
use zbus::message::Flags;
use zbus::wire::Variant;
use zbus::{Fd, Message, MessageStream};

/// Has the daemon on `bus` add `file` as `name`; what comes of it is lines of the pipe.
///
/// # Errors
/// No daemon on the bus, or its own error.
pub(in crate::ctl) async fn add(bus: &Bus, file: File, name: &str, sha256: Option<Digest>) -> anyhow::Result<Pipe> {
    let link = Link::to(bus).await?;
    let sha256 = sha256.map(|digest| ("sha256", Variant::from(digest.to_string())));
    let options: HashMap<&str, Variant<'_>> = sha256.into_iter().collect();
    let reply = link.call_asking("AddModel", &(Fd::from(&file), name, options)).await?;
    Ok(Pipe { pipe: pipe_of(&reply)?, _connection: link.connection })
}

impl Link {
    /// Calls what polkit may ask somebody about.
    async fn call_asking<B: serde::Serialize + zbus::wire::DynamicType>(
        &self,
        method: &str,
        body: &B,
    ) -> anyhow::Result<Message> {
        let call = Message::method_call(ROOT, method).destination(NAME).interface(MANAGER);
        let call = call.with_flags(Flags::ALLOW_INTERACTIVE_AUTH).build(body)?;
        let serial = call.primary_header().serial_num();
        let mut replies = MessageStream::from(&self.connection);
        self.connection.send(&call).await?;
        while let Some(message) = replies.next().await {
            let message = message?;
            if message.header().reply_serial() == Some(serial) {
                return match message.message_type() {
                    zbus::message::Type::Error => Err(said(zbus::Error::from(message), &self.bus)),
                    _ => Ok(message),
                };
            }
        }
        Err(anyhow!("the bus has gone")).context(method.to_owned())
    }
}
