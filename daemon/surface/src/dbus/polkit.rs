//! May this caller do what is an administrator's? Root may; of others polkit says so, where it is there. On another bus
//! than the system's the daemon's own user may, whose files these are.

use super::call::{Call, CallError};
use std::collections::HashMap;
use zbus::Connection;
use zbus::wire::Variant;

/// polkit's action for sessions of other users.
pub(super) const MANAGE_OTHERS: &str = "org.sparsed1.manage-sessions-of-others";

/// polkit's action for models that go into the store.
pub(super) const ADD_MODELS: &str = "org.sparsed1.add-models";

const AUTHORITY: &str = "org.freedesktop.PolicyKit1";
const AUTHORITY_PATH: &str = "/org/freedesktop/PolicyKit1/Authority";
const AUTHORITY_INTERFACE: &str = "org.freedesktop.PolicyKit1.Authority";
/// `AllowUserInteraction`
const ASK_USER: u32 = 1;

/// Whether it is allowed, whether it would be after somebody was asked, and details.
type Answer = ((bool, bool, HashMap<String, String>),);

/// Lets `call` pass if its caller may do `action`. `bus` is the system's bus, where polkit's name is guarded; on
/// another
/// one anybody could have it.
///
/// # Errors
/// `AccessDenied`, with the reason.
pub(super) async fn check(bus: Option<&Connection>, call: &Call, action: &str) -> Result<(), CallError> {
    // Not on the system's: a plugin's process has this user, too, and may less.
    let is_own = || bus.is_none() && call.uid == rustix::process::getuid().as_raw();
    if call.uid == 0 || is_own() {
        return Ok(());
    }
    let denied = |reason: &str| CallError::Standard("AccessDenied", format!("{action} is not allowed: {reason}"));
    let bus =
        bus.ok_or_else(|| denied("only root and the daemon's own user may, since this is not the system's bus"))?;
    let subject = ("system-bus-name", HashMap::from([("name", Variant::from(call.sender.as_str()))]));
    let details: HashMap<&str, &str> = HashMap::new();
    let flags = if call.may_ask_user() { ASK_USER } else { 0 };
    let asked = (subject, action, details, flags, "");
    let reply =
        bus.call_method(Some(AUTHORITY), AUTHORITY_PATH, Some(AUTHORITY_INTERFACE), "CheckAuthorization", &asked);
    let reply = reply.await.map_err(|error| denied(&format!("polkit does not answer: {error}")))?;
    let body = reply.body();
    let answer: zbus::Result<Answer> = body.deserialize();
    let ((is_authorized, is_challenge, _),) = answer.map_err(|error| denied(&error.to_string()))?;
    match (is_authorized, is_challenge) {
        (true, _) => Ok(()),
        (false, true) => Err(denied("an administrator's password is needed; allow interactive authorization")),
        (false, false) => Err(denied("you are no administrator")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_are_the_actions_that_are_asked_about() {
        let policy = include_str!("../../../../packaging/dbus/org.sparsed1.policy");
        let installed: Vec<&str> =
            policy.split("<action id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(installed, [MANAGE_OTHERS, ADD_MODELS]);
        // Nobody is let without an administrator's word, and the daemon's user may ask about each.
        assert_eq!(policy.matches("<allow_").count(), policy.matches(">auth_admin").count());
        assert_eq!(policy.matches("unix-user:sparsed").count(), installed.len());
    }
}
