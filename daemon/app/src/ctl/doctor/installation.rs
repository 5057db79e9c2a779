//! Is what was installed and configured whole? Configuration, models.

use super::machine::Memory;
use super::people::shut_at;
use super::service::Service;
use super::{Check, sets, size};
use crate::assemble::{configured_models, is_packaged};
use crate::config::{Config, ConfigError, Paths, Source, dotted};
use crate::ctl::inspect;
use crate::store::{Digest, ModelAtPath, Source as Origin, Store, named_by_content, reference};
use rustix::fs::Access;
use rustix::io::Errno;
use sparsed_model::Inspection;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Stands for whichever hub there is.
const ANY_HUB: &str = "https://hub.invalid";
/// The package of the default model.
const MODEL_PACKAGE: &str = "sparsed-model-smollm2-dsa";

/// What the daemon would read, whether it may, and whether it would take it.
pub(super) fn configuration(root: &Path, source: &Source, service: Option<&Service>) -> (Check, Option<Config>) {
    const NAME: &str = "configuration";
    let read = source.layers().and_then(|layers| {
        let files: Vec<PathBuf> = layers.files().map(Path::to_owned).collect();
        Ok((layers.config()?, files))
    });
    let (config, files) = match read {
        Ok(read) => read,
        Err(error) => {
            let found = format!("{error}; the checks below use the defaults");
            return (Check::fail(NAME, found, mends(&error)), None);
        }
    };
    let shut = |file: &PathBuf| Some((file.clone(), shut_at(root, file, &service?.groups)?.to_owned()));
    let check = match files.iter().find_map(shut) {
        Some((file, at)) => {
            let found = format!("{} cannot be read by the daemon's user, only by you", file.display());
            Check::fail(NAME, found, format!("sudo chmod a+rX {} && sudo systemctl restart sparsed", at.display()))
        }
        None if files.is_empty() => Check::ok(NAME, "none, all defaults"),
        None => {
            let files: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
            Check::ok(NAME, files.join(", "))
        }
    };
    (check, Some(config))
}

/// What mends a configuration: its file's mode, or what is in the file; of the command line only the check is named.
fn mends(error: &ConfigError) -> String {
    let file = match error {
        ConfigError::Io { path, cause } if cause.kind() == ErrorKind::PermissionDenied => {
            return format!("sudo chmod a+rX {}", path.display());
        }
        ConfigError::Io { path, .. } if error.may_mend_itself() => {
            return format!("ls -l {}; mount what the link leads to, or remove the link", path.display());
        }
        ConfigError::Io { path, .. } => path.to_str(),
        ConfigError::Invalid { origin, .. } => origin.split(':').next(),
    };
    match file {
        Some(file) if file.starts_with('/') => {
            format!("sudoedit {file} && sparsectl config check && sudo systemctl restart sparsed")
        }
        _ => "sparsectl config check".to_owned(),
    }
}

/// Whether packages have put this program here.
fn is_installed() -> bool {
    std::env::current_exe().is_ok_and(|path| path.starts_with("/usr"))
}

/// What installs one of our packages, or `again` the one that is there.
pub(super) fn installs(package: &str, again: bool) -> String {
    installs_by(Path::new("/usr/bin/apt").exists(), package, again)
}

fn installs_by(apt: bool, package: &str, again: bool) -> String {
    match (apt, again) {
        (true, false) => format!("sudo apt install ./{package}_*.deb"),
        (true, true) => format!("sudo apt install --reinstall ./{package}_*.deb"),
        (false, false) => format!("sudo rpm -U ./{package}-*.rpm"),
        (false, true) => format!("sudo rpm -U --replacepkgs ./{package}-*.rpm"),
    }
}

/// What has the model `name` be the one of this name in the store.
fn from_store(name: &str) -> String {
    format!("{} = \"store:{name}\"", dotted(&["model", name, "path"]))
}

/// What brings a model's file into the store, where the service can read it.
fn copies(name: &str, path: &Path) -> String {
    let file = quoted(&format!("file:{}", path.display()));
    format!("sudo sparsectl model pull {file} --name {name}, then {}", sets(&from_store(name)))
}

/// What brings a model that is not there.
fn brings(name: &str, config: &Config, is_installed: bool) -> String {
    match (is_packaged(config, name), is_installed) {
        (true, true) => format!(
            "{}; another model: sudo sparsectl model pull URL, then /usr/share/doc/sparsed/models.md",
            installs(MODEL_PACKAGE, false)
        ),
        (true, false) => "make models".to_owned(),
        (false, true) => format!("sudo sparsectl model pull URL --name {name}, then {}", sets(&from_store(name))),
        (false, false) => format!("sparsectl model pull URL --name {name}, then {}", from_store(name)),
    }
}

/// What fetches a file anew that is not whole: from where it came, if the store knows that.
fn fetches_again(store: &Store, configured: &Path, path: &Path) -> String {
    let is_of_service = store.dir().starts_with("/var");
    let sudo = if is_of_service { "sudo " } else { "" };
    let stored = reference(configured);
    match stored.and_then(|name| Some((name, store.entry(name).ok()?.source))) {
        Some((name, source)) => pulls_again(is_of_service, name, &source),
        None if path.starts_with("/usr/share/sparsed/models") => installs(MODEL_PACKAGE, true),
        None => {
            format!("{sudo}sparsectl model pull URL{}", stored.map_or(String::new(), |name| format!(" --name {name}")))
        }
    }
}

/// What fetches the model `name` from its remembered `source`.
fn pulls_again(is_of_service: bool, name: &str, source: &str) -> String {
    if Origin::parse(source, Some(ANY_HUB)).is_err() {
        // It came by D-Bus, and nobody knows which file it was.
        return format!("sparsectl model pull --dbus file:PATH --name {name}");
    }
    let sudo = match is_of_service {
        false => "",
        // The hub's address and a token are the user's, not root's.
        true if Origin::is_of_hub(source) => "sudo --preserve-env=HF_ENDPOINT,HF_TOKEN ",
        true => "sudo ",
    };
    format!("{sudo}sparsectl model pull {} --name {name}", quoted(source))
}

/// A word for the shell.
pub(super) fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "/:._-@%+,=".contains(letter);
    match word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// Whether each configured model can be read and served, and whether it fits; with `full` whether all of it can be
/// read.
pub(super) fn models(
    root: &Path,
    config: &Config,
    paths: &Paths,
    memory: Option<&Memory>,
    full: bool,
    service: Option<&Service>,
) -> Vec<Check> {
    let models = configured_models(config, paths).into_iter();
    let store = Store::at(&paths.models_dir);
    let checks = models.map(|(name, model)| {
        let title = format!("model {name}");
        if let Some(error) = reference(&model.path).and_then(|stored| store.entry(stored).err()) {
            if is_closed(&error) {
                return Check::warn(title, format!("its store is closed to you: {error:#}"), AS_DAEMON);
            }
            return Check::fail(title, format!("{error:#}"), fetches_again(&store, &model.path, &model.path));
        }
        let path = store.resolve(&model.path);
        let shown = path.display();
        let opened = File::open(&path).map_err(anyhow::Error::from);
        match &opened {
            Err(error) if !is_closed(error) => {
                return Check::fail(title, format!("{shown}: {error}"), brings(&name, config, is_installed()));
            }
            Err(_) if service.is_none_or(|service| service.hides(&path).is_none()) => {
                return closed(title, &name, &path, paths, service);
            }
            // Whoever asks sees more than the service, or less.
            _ => {
                if let Some(why) = service.and_then(|service| service.keeps_from(root, &path)) {
                    return Check::fail(title, format!("{shown} {why}"), copies(&name, &path));
                }
            }
        }
        let found = match Inspection::read(&path) {
            Ok(found) => found,
            Err(error) => {
                let found = format!("the file is not whole: {error}");
                return Check::fail(title, found, fetches_again(&store, &model.path, &path));
            }
        };
        if let Some(reason) = found.refusals.first() {
            return Check::fail(title, reason.clone(), format!("sparsectl inspect {shown}"));
        }
        let read = match integrity(&store, &model.path, &path, full) {
            Ok(read) => read,
            Err(error) => {
                return Check::fail(title, format!("{error:#}"), fetches_again(&store, &model.path, &path));
            }
        };
        let bytes = inspect::bytes_to_serve(&found, model.max_context);
        match (bytes, memory) {
            (Some(bytes), Some(memory)) if bytes > memory.free => {
                let text = format!("{shown} takes some {}, {} are free", size(bytes), size(memory.free));
                Check::warn(
                    title,
                    text,
                    sets(&format!("a smaller {}, or a smaller model", dotted(&["model", &name, "max_context"]))),
                )
            }
            (Some(bytes), _) => {
                Check::ok(title, format!("{shown}, some {} with its whole context; {read}", size(bytes)))
            }
            (None, _) => Check::ok(title, format!("{shown}; {read}")),
        }
    });
    checks.collect()
}

/// What a user does who may not see what the daemon's user sees.
pub(super) const AS_DAEMON: &str = "sudo -u sparsed sparsectl doctor";

/// Whether it is only whoever asks that may not look.
pub(super) fn is_closed(error: &anyhow::Error) -> bool {
    let denied = |cause: &std::io::Error| cause.kind() == ErrorKind::PermissionDenied;
    error.chain().any(|cause| {
        let errno = cause.downcast_ref::<Errno>().map(|errno| std::io::Error::from(*errno));
        errno.as_ref().or_else(|| cause.downcast_ref()).is_some_and(denied)
    })
}

/// A model's file that whoever asks may not read. For the daemon's own user that is what is wrong.
fn closed(title: String, name: &str, path: &Path, paths: &Paths, service: Option<&Service>) -> Check {
    let shown = path.display();
    let found = format!("{shown} cannot be read by you");
    match service {
        None => Check::fail(title, found, format!("sudo chmod a+rX {shown}")),
        Some(_) if rustix::fs::access(&paths.state_dir, Access::EXEC_OK).is_err() => {
            Check::warn(title, found, AS_DAEMON)
        }
        Some(_) => Check::fail(title, found, copies(name, path)),
    }
}

/// How far the file of a model is known to be whole.
///
/// # Errors
/// A file that cannot be read, or that is not what it was.
fn integrity(store: &Store, configured: &Path, path: &Path, full: bool) -> anyhow::Result<String> {
    if !full {
        return Ok("its head was read; --full reads all".to_owned());
    }
    if let Some(name) = reference(configured) {
        store.verify(name, &store.entry(name)?, &mut |_| {})?;
        return Ok("all of it is what was fetched".to_owned());
    }
    if named_by_content(path).is_some() {
        ModelAtPath::new(path, &configured.display().to_string(), None).verify(&mut |_| {})?;
        return Ok("all of it is what was packaged".to_owned());
    }
    if path.is_dir() {
        return Ok("a folder: its files have no digests to compare with".to_owned());
    }
    let digest = Digest::of_file(&File::open(path)?, &mut |_| Ok(()))?;
    Ok(format!("all of it can be read, nobody has told its SHA-256: {digest}"))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::config::Model;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_model_that_is_absent_or_cut_is_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let mut config = Config::default();
        config.model.insert("small".to_owned(), Model::at(path.clone()));
        let said = |config: &Config| models(Path::new("/"), config, &Paths::of(config), None, false, None).remove(0);
        assert_eq!(said(&config).verdict, Verdict::Fail);
        fs::write(&path, b"GGUF\x03\0\0\0").unwrap();
        let cut = said(&config);
        assert!(cut.verdict == Verdict::Fail && cut.name == "model small" && cut.found.contains("m.gguf"), "{cut:?}");
    }

    #[test]
    fn a_model_that_is_there_for_you_and_not_for_the_service_is_to_be_copied_into_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("m.gguf");
        fs::write(&path, "GGUF").unwrap();
        let mut config = Config::default();
        config.model.insert("qwen2.5".to_owned(), Model::at(path.clone()));
        let hidden = vec![(path.parent().unwrap().to_owned(), "ProtectHome=yes".to_owned())];
        let service = Service { hidden, ..Service::default() };
        let paths = Paths::of(&config);
        let said = models(Path::new("/"), &config, &paths, None, false, Some(&service)).remove(0);
        assert_eq!(said.verdict, Verdict::Fail);
        assert!(said.found.ends_with("is not there for sparsed.service (ProtectHome=yes)"), "{said:?}");
        let fix = said.fix.unwrap();
        assert!(fix.starts_with(&format!("sudo sparsectl model pull file:{} --name qwen2.5", path.display())), "{fix}");
        assert!(fix.contains("model.\"qwen2.5\".path = \"store:qwen2.5\""), "{fix}");
    }

    #[test]
    fn a_file_that_is_closed_to_whoever_asks_is_known_however_it_was_opened() {
        let closed: [anyhow::Error; 2] =
            [std::io::Error::from(ErrorKind::PermissionDenied).into(), Errno::ACCESS.into()];
        assert!(closed.into_iter().all(|error| is_closed(&error.context("the key"))));
        assert!(!is_closed(&Errno::NOENT.into()) && !is_closed(&anyhow::anyhow!("Permission denied")));
    }

    #[test]
    fn a_model_that_has_decayed_is_found_when_all_of_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (store, stored, partial) =
            (Store::at(&dir.path().join("models")), Path::new("store:m"), dir.path().join("x"));
        store.make().unwrap();
        fs::write(&partial, "weights").unwrap();
        store.put("m", &[(partial, Digest::of(b"weights"))], "file:x".to_owned()).unwrap();
        let path = store.resolve(stored);
        assert!(integrity(&store, stored, &path, true).unwrap().contains("what was fetched"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, "weightz").unwrap();
        assert!(integrity(&store, stored, &path, false).unwrap().contains("--full"));
        assert!(integrity(&store, stored, &path, true).unwrap_err().to_string().contains("damaged"));
        // A link to a file that is named by its digest says what it was, too; of another file nobody knows.
        let (link, plain) = (dir.path().join("link.gguf"), dir.path().join("plain.gguf"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(integrity(&store, &link, &link, false).unwrap().contains("--full"));
        let said = integrity(&store, &link, &link, true).unwrap_err().to_string();
        assert!(said.contains("link.gguf' is damaged"), "{said}");
        fs::copy(&path, &plain).unwrap();
        let said = integrity(&store, &plain, &plain, true).unwrap();
        assert!(said.contains(&Digest::of(b"weightz").to_string()), "{said}");
    }

    #[test]
    fn a_file_with_a_mistake_is_opened_and_a_model_that_is_gone_is_fetched_from_where_it_came() {
        let error = |origin: &str| ConfigError::Invalid { origin: origin.to_owned(), reason: String::new() };
        let said = mends(&error("/etc/sparsed/conf.d/a.toml:3:1"));
        assert!(said.starts_with("sudoedit /etc/sparsed/conf.d/a.toml && sparsectl config check"), "{said}");
        assert_eq!(mends(&error("--set x=y")), "sparsectl config check");
        let cause = ErrorKind::PermissionDenied.into();
        let said = mends(&ConfigError::Io { path: "/etc/sparsed/conf.d/a.toml".into(), cause });
        assert_eq!(said, "sudo chmod a+rX /etc/sparsed/conf.d/a.toml");
        let dir = tempfile::tempdir().unwrap();
        let (store, partial) = (Store::at(&dir.path().join("models")), dir.path().join("x"));
        store.make().unwrap();
        fs::write(&partial, "weights").unwrap();
        store.put("m", &[(partial, Digest::of(b"weights"))], "https://example.org/a&b.gguf".to_owned()).unwrap();
        let again = |configured: &str| fetches_again(&store, Path::new(configured), Path::new("/nowhere"));
        assert_eq!(again("store:m"), "sparsectl model pull 'https://example.org/a&b.gguf' --name m");
        assert_eq!(again("store:other"), "sparsectl model pull URL --name other");
        let said = pulls_again(true, "m", "D-Bus, uid 1000");
        assert_eq!(said, "sparsectl model pull --dbus file:PATH --name m");
        let said = pulls_again(true, "m", "hf:a/b/m.gguf@v1");
        assert_eq!(said, "sudo --preserve-env=HF_ENDPOINT,HF_TOKEN sparsectl model pull hf:a/b/m.gguf@v1 --name m");
        assert_eq!(pulls_again(true, "m", "file:/m"), "sudo sparsectl model pull file:/m --name m");
        assert!(brings("default", &Config::default(), true).contains("./sparsed-model-smollm2-dsa"));
        assert_eq!(installs_by(true, "p", true), "sudo apt install --reinstall ./p_*.deb");
        assert_eq!(installs_by(false, "p", true), "sudo rpm -U --replacepkgs ./p-*.rpm");
        assert_eq!(brings("default", &Config::default(), false), "make models");
    }
}
