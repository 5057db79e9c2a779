//! Which object does a path name?

use super::interface::{INTROSPECTABLE, Interface, MANAGER, PEER, PROPERTIES, REQUEST, ROOT, SESSION};

/// An object by its path. That a path can be one does not mean that its object is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Object<'p> {
    /// A node that only leads to others.
    Folder(Folder<'p>),
    Manager,
    /// A session by its id.
    Session(&'p str),
    /// A request by what follows `requests/`.
    Request(&'p str),
}

/// A node above objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Folder<'p> {
    Root,
    Org,
    Sessions,
    Requests,
    /// Those of one connection.
    RequestsOf(&'p str),
}

impl<'p> Object<'p> {
    /// The object at `path`.
    pub(super) fn at(path: &'p str) -> Option<Self> {
        let below = match path {
            "/" => return Some(Self::Folder(Folder::Root)),
            "/org" => return Some(Self::Folder(Folder::Org)),
            _ => path.strip_prefix(ROOT)?,
        };
        let parts: Vec<&str> = below.split('/').collect();
        match parts[..] {
            [""] => Some(Self::Manager),
            ["", "sessions"] => Some(Self::Folder(Folder::Sessions)),
            ["", "sessions", id] => Some(Self::Session(id)),
            ["", "requests"] => Some(Self::Folder(Folder::Requests)),
            ["", "requests", sender] => Some(Self::Folder(Folder::RequestsOf(sender))),
            ["", "requests", _, _] => below.strip_prefix("/requests/").map(Self::Request),
            _ => None,
        }
    }

    /// Its own interface.
    pub(super) fn own(self) -> Option<&'static Interface> {
        match self {
            Self::Folder(_) => None,
            Self::Manager => Some(&MANAGER),
            Self::Session(_) => Some(&SESSION),
            Self::Request(_) => Some(&REQUEST),
        }
    }

    /// All of its interfaces.
    pub(super) fn interfaces(self) -> Vec<&'static Interface> {
        match self.own() {
            None => vec![&PEER, &INTROSPECTABLE],
            Some(own) => vec![&PEER, &INTROSPECTABLE, &PROPERTIES, own],
        }
    }
}

/// A session's path. Its id has only characters that a path may have.
pub(super) fn session_path(id: &str) -> String {
    format!("{ROOT}/sessions/{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_one_object_or_none() {
        for (path, object) in [
            ("/", Some(Object::Folder(Folder::Root))),
            ("/org/sparsed1", Some(Object::Manager)),
            ("/org/sparsed1/sessions/sess_0a", Some(Object::Session("sess_0a"))),
            ("/org/sparsed1/requests/1_7", Some(Object::Folder(Folder::RequestsOf("1_7")))),
            ("/org/sparsed1/requests/1_7/r1", Some(Object::Request("1_7/r1"))),
            ("/org/sparsed1/requests/1_7/r1/x", None),
            ("/org/sparsed12", None),
            ("/org/sparsed", None),
        ] {
            assert_eq!(Object::at(path), object, "{path}");
        }
    }
}
