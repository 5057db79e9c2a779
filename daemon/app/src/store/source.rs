//! Where is a model to be fetched from? A URL, a file of a hub that speaks Hugging Face's paths, or a file of this box.

use super::parts;
use anyhow::{Context, bail, ensure};
use hyper::Uri;
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::PathBuf;

/// What begins the source of a hub's file.
const OF_HUB: &str = "hf:";
/// The branch of a hub's repository.
const REVISION: &str = "main";

/// A place to fetch from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// By HTTP.
    Web(Uri),
    /// By HTTP from a hub.
    Hub {
        /// The file's address there.
        uri: Uri,
        /// As it was asked for: `hf:OWNER/NAME/PATH`, with `@REVISION` if that was said.
        name: String,
    },
    /// From this box.
    File(PathBuf),
}

impl Source {
    /// Reads `https://...`, `http://...`, `hf:OWNER/NAME/PATH`, `hf:OWNER/NAME/PATH@REVISION` or `file:PATH`. `hub` is
    /// what stands before a repository's name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, hub: Option<&str>) -> anyhow::Result<Self> {
        if let Some(path) = text.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            ensure!(!path.is_empty(), "'{text}' names no file");
            // As it is remembered it must lead there from any folder.
            return Ok(Self::File(std::path::absolute(path)?));
        }
        let of_hub = text.strip_prefix(OF_HUB).map(|file| in_hub(file, hub)).transpose()?;
        let url = of_hub.as_deref().unwrap_or(text);
        let uri: Uri = url.parse().with_context(|| format!("'{url}' is no URL"))?;
        match uri.scheme_str() {
            Some("http" | "https") if uri.host().is_some_and(|host| !host.is_empty()) => Ok(match of_hub {
                Some(_) => Self::Hub { uri, name: text.to_owned() },
                None => Self::Web(uri),
            }),
            _ => bail!("'{text}' must begin with https://, http://, hf: or file:"),
        }
    }

    /// Whether a remembered source is a hub's file: who fetches it again needs the hub's address, and perhaps a token.
    pub fn is_of_hub(remembered: &str) -> bool {
        remembered.starts_with(OF_HUB)
    }

    /// What is remembered of it: no user, password or query, which may be secrets. Of a hub's file not the hub, which
    /// may be another mirror the next time, and which alone is sent a token.
    pub fn public(&self) -> String {
        match self {
            Self::Hub { name, .. } => name.clone(),
            Self::Web(uri) => {
                let (scheme, host) = (uri.scheme_str().unwrap_or_default(), uri.host().unwrap_or_default());
                let port = uri.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
                format!("{scheme}://{host}{port}{}", uri.path())
            }
            Self::File(path) => format!("file:{}", path.display()),
        }
    }

    /// The name that a model from there has when nobody gives it another one: that of its file, without `.gguf` and
    /// the numbers of a part.
    ///
    /// # Errors
    /// As [`Source::parts`].
    pub fn default_name(&self) -> anyhow::Result<String> {
        Ok(parts::names(&self.file())?.0)
    }

    /// The files of a model: of a first part all of its kind, which lie beside it.
    ///
    /// # Errors
    /// A part that is not the first, or too many.
    pub fn parts(&self) -> anyhow::Result<Vec<Self>> {
        let file = self.file();
        let (_, names) = parts::names(&file)?;
        let beside = |name: &String| {
            Ok(match self {
                Self::File(path) => Self::File(path.with_file_name(name)),
                Self::Web(uri) => Self::Web(with_file_name(uri, &file, name)?),
                Self::Hub { uri, name: whole } => {
                    Self::Hub { uri: with_file_name(uri, &file, name)?, name: whole.replace(&file, name) }
                }
            })
        };
        names.iter().map(beside).collect()
    }

    /// The last part of its path.
    fn file(&self) -> String {
        let path = match self {
            Self::Web(uri) | Self::Hub { uri, .. } => uri.path().to_owned(),
            Self::File(path) => path.display().to_string(),
        };
        path.rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// What its unfinished file is called.
    pub(super) fn key(&self) -> String {
        let whole = match self {
            Self::Web(uri) | Self::Hub { uri, .. } => uri.to_string(),
            Self::File(path) => path.display().to_string(),
        };
        Sha256::digest(whole).iter().take(8).fold(String::new(), |mut key, byte| {
            write!(key, "{byte:02x}").expect("a string takes all");
            key
        })
    }
}

/// The address of another file beside `file`, which ends the path of `uri`; a query may follow it.
fn with_file_name(uri: &Uri, file: &str, name: &str) -> anyhow::Result<Uri> {
    let (folder, query) = (uri.path().strip_suffix(file).unwrap_or("/"), uri.query());
    let path = format!("{folder}{name}{}", query.map(|query| format!("?{query}")).unwrap_or_default());
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(path.parse()?);
    Ok(Uri::from_parts(parts)?)
}

/// The URL of a hub's file.
fn in_hub(file: &str, hub: Option<&str>) -> anyhow::Result<String> {
    let hub =
        hub.context("hf: needs to know the hub: set models.hub, or HF_ENDPOINT, or --hub, to its https:// address")?;
    let (file, revision) = file.rsplit_once('@').unwrap_or((file, REVISION));
    let mut parts = file.splitn(3, '/');
    let (Some(owner), Some(name), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
        bail!("'hf:{file}' must be hf:OWNER/NAME/FILE");
    };
    ensure!(
        [owner, name, revision].iter().chain(&path.split('/').collect::<Vec<_>>()).all(|part| is_plain(part)),
        "'hf:{file}' must be hf:OWNER/NAME/FILE, each part of letters, digits, '.', '_' and '-'"
    );
    Ok(format!("{}/{owner}/{name}/resolve/{revision}/{path}", hub.trim_end_matches('/')))
}

fn is_plain(part: &str) -> bool {
    let fits = |letter: u8| letter.is_ascii_alphanumeric() || b"._-".contains(&letter);
    !part.is_empty() && part != "." && part != ".." && part.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web(text: &str) -> String {
        match Source::parse(text, Some("https://hub.example/")).unwrap() {
            Source::Web(uri) | Source::Hub { uri, .. } => uri.to_string(),
            Source::File(path) => panic!("{}", path.display()),
        }
    }

    #[test]
    fn a_hubs_file_is_a_url_below_the_hub() {
        assert_eq!(web("hf:a/b/c.gguf"), "https://hub.example/a/b/resolve/main/c.gguf");
        assert_eq!(web("hf:a/b/d/c.gguf@v1.0"), "https://hub.example/a/b/resolve/v1.0/d/c.gguf");
        let without = Source::parse("hf:a/b/c.gguf", None).unwrap_err().to_string();
        assert!(without.contains("models.hub"), "{without}");
        for bad in ["hf:a/b", "hf:a//c", "hf:a/b/../c", "hf:a/b/c?x", "hf:a/b/c@", "hf:a/b/c d"] {
            assert!(Source::parse(bad, Some("https://hub.example")).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_remembered_has_no_secret() {
        let source = Source::parse("https://me:word@host:8443/a/b.gguf?token=x", None).unwrap();
        assert_eq!(source.public(), "https://host:8443/a/b.gguf");
        assert_eq!(source.default_name().unwrap(), "b");
        // A hub's file is asked of whichever hub there is then, with the token that goes nowhere else.
        let of_hub = |text: &str| Source::parse(text, Some("https://me:word@hub.example")).unwrap();
        assert_eq!(of_hub("hf:a/b/c.gguf@v1").public(), "hf:a/b/c.gguf@v1");
        let parts = of_hub("hf:a/b/m-00001-of-00002.gguf").parts().unwrap();
        assert_eq!(parts[0].public(), "hf:a/b/m-00001-of-00002.gguf");
        assert_eq!(parts[1], of_hub("hf:a/b/m-00002-of-00002.gguf"));
        assert_ne!(source.key(), Source::parse("https://host:8443/a/b.gguf", None).unwrap().key());
    }

    #[test]
    fn a_first_part_brings_those_beside_it_and_the_query_of_each() {
        let source = Source::parse("https://me:word@host:8443/a/m-00001-of-00002.gguf?token=x", None).unwrap();
        let urls = source.parts().unwrap().into_iter().map(|part| match part {
            Source::Web(uri) => uri.to_string(),
            other => panic!("{other:?}"),
        });
        assert!(urls.eq(["1", "2"].map(|n| format!("https://me:word@host:8443/a/m-0000{n}-of-00002.gguf?token=x"))));
        assert_eq!(source.default_name().unwrap(), "m");
        let file = Source::parse("file:/a/m-00001-of-00002.gguf", None).unwrap();
        assert_eq!(file.parts().unwrap()[1], Source::File("/a/m-00002-of-00002.gguf".into()));
        assert_eq!(web("hf:a/b/m.gguf"), "https://hub.example/a/b/resolve/main/m.gguf");
    }

    #[test]
    fn files_are_named_with_and_without_slashes_and_nothing_else_is_a_source() {
        for text in ["file:/m.gguf", "file:///m.gguf"] {
            assert_eq!(Source::parse(text, None).unwrap(), Source::File("/m.gguf".into()));
        }
        let relative = Source::parse("file:a/m.gguf", None).unwrap();
        let path = std::env::current_dir().unwrap().join("a/m.gguf");
        assert_eq!(relative.public(), format!("file:{}", path.display()));
        for bad in ["", "m.gguf", "/m.gguf", "ftp://host/m", "https://", "https:///m", "file:", "http://a b/"] {
            assert!(Source::parse(bad, None).is_err(), "{bad}");
        }
    }
}
