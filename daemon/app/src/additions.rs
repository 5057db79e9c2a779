//! What does a model become that comes in by a door? A file of the store, which `sparsectl model pull` fills otherwise.

use crate::assemble::configured_models;
use crate::config::{Config, Paths};
use crate::store::{Copied, CopyError, Digest, Store, Watcher, check_name, how_to_serve, reference};
use sparsed_model::{Inspection, ModelError};
use sparsed_surface::{AddFailure, AddStage, AddStep, AddedModel, ModelStore, NewModel};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

/// What a GGUF begins with.
const MAGIC: [u8; 4] = *b"GGUF";

/// The store, as doors have it.
#[derive(Debug)]
pub(crate) struct Additions {
    store: Store,
    bytes_max: u64,
    /// Models of the configuration by their names of the store.
    served: BTreeMap<String, Vec<String>>,
}

impl Additions {
    /// The store of this configuration.
    pub(crate) fn new(config: &Config, paths: &Paths) -> Self {
        let store = Store::at(&paths.models_dir);
        if let Err(error) = store.forget_copy() {
            log::debug!(reason:% = format!("{error:#}"); "what was left of a model that was being added stays");
        }
        let mut served = BTreeMap::<String, Vec<String>>::new();
        for (name, model) in configured_models(config, paths) {
            if let Some(stored) = reference(&model.path) {
                served.entry(stored.to_owned()).or_default().push(name);
            }
        }
        Self { store, bytes_max: config.models.max_bytes.0, served }
    }

    /// What is to be done to have `name` served.
    fn next(&self, name: &str) -> String {
        match self.served.get(name) {
            Some(models) => format!("the configuration has it as {}: the next time that is loaded", models.join(", ")),
            None => how_to_serve(name),
        }
    }

    fn copy(&self, model: &NewModel, watcher: &mut dyn Watcher) -> Result<Copied, AddFailure> {
        let (limit, length) = (self.bytes_max, model.file.metadata().map_or(0, |meta| meta.len()));
        if length > limit {
            return Err(AddFailure::TooLarge { bytes: length, limit });
        }
        let mut magic = [0; MAGIC.len()];
        if length >= MAGIC.len() as u64 && model.file.read_exact_at(&mut magic, 0).is_ok() && magic != MAGIC {
            // Before it is copied for minutes.
            return Err(AddFailure::NoModel("it does not begin as one does".to_owned()));
        }
        self.store.copy(&model.file, limit, watcher).map_err(|error| match error {
            CopyError::NoFile | CopyError::Unreadable(_) => invalid("file", &error),
            CopyError::Changed { .. } => AddFailure::Changed(error.to_string()),
            CopyError::NoRoom(reason) => AddFailure::NoRoom(format!("{reason:#}")),
            CopyError::Failed(reason) => self.failed(&reason),
        })
    }

    /// The store cannot be written; what helps where it is somebody else's.
    fn failed(&self, reason: &anyhow::Error) -> AddFailure {
        let kind = reason.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
        let dir = self.store.dir().display();
        let hint = match kind {
            Some(ErrorKind::PermissionDenied) => format!("; it must be the daemon's own: chown -R sparsed: {dir}"),
            _ => String::new(),
        };
        AddFailure::Store(format!("{reason:#}{hint}"))
    }
}

impl ModelStore for Additions {
    fn check(&self, name: &str, sha256: Option<&str>) -> Result<(), AddFailure> {
        check_name(name).map_err(|reason| invalid("name", &reason))?;
        sha256.map(str::parse::<Digest>).transpose().map_err(|reason| invalid("sha256", &reason))?;
        Ok(())
    }

    fn add(&self, model: NewModel, step: &mut dyn FnMut(AddStep) -> ControlFlow<()>) -> Result<AddedModel, AddFailure> {
        self.check(&model.name, model.sha256.as_deref())?;
        let mut steps = Steps { step, is_stopped: false };
        let copied = self.copy(&model, &mut steps);
        // Whatever else it is called: it was not wanted any more.
        let copied = if steps.is_stopped { Err(AddFailure::Stopped) } else { copied }?;
        let (found, wanted) = (copied.digest().to_string(), model.sha256.map(|text| text.to_ascii_lowercase()));
        if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
            return Err(AddFailure::OtherDigest { found, wanted });
        }
        let inspection = Inspection::read(copied.path()).map_err(|error| AddFailure::NoModel(without_path(&error)))?;
        let not_served = inspection.refusals.into_iter().next();
        let entry = copied.put(&model.name, model.origin).map_err(|reason| self.failed(&reason))?;
        Ok(AddedModel {
            sha256: entry.sha256.to_string(),
            bytes: entry.bytes,
            served_as: self.served.get(&model.name).cloned().unwrap_or_default(),
            next: self.next(&model.name),
            not_served,
            name: model.name,
        })
    }
}

/// Passes on how far a copy is.
struct Steps<'a> {
    step: &'a mut dyn FnMut(AddStep) -> ControlFlow<()>,
    is_stopped: bool,
}

impl Steps<'_> {
    fn take(&mut self, step: AddStep) -> std::io::Result<()> {
        self.is_stopped = (self.step)(step).is_break();
        if self.is_stopped { Err(std::io::Error::other("it is not wanted any more")) } else { Ok(()) }
    }
}

impl Watcher for Steps<'_> {
    fn fetched(&mut self, done: u64, total: Option<u64>) -> std::io::Result<()> {
        self.take(AddStep { stage: AddStage::Copying, done, total: total.unwrap_or(done) })
    }

    fn hashed(&mut self, done: u64, total: u64) -> std::io::Result<()> {
        self.take(AddStep { stage: AddStage::Verifying, done, total })
    }

    fn note(&mut self, _: &str) {}
}

fn invalid(param: &'static str, reason: &dyn std::fmt::Display) -> AddFailure {
    AddFailure::Invalid { param, reason: format!("cannot be taken: {reason}") }
}

/// What is wrong, without the name that the copy has for a while.
fn without_path(error: &ModelError) -> String {
    match error {
        ModelError::Io { source, .. } => source.to_string(),
        ModelError::File { source, .. } => source.to_string(),
        ModelError::Split { .. } => {
            "it is part of several; `sparsectl model pull file:` takes them together".to_owned()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::path::Path;

    struct Bench {
        dir: tempfile::TempDir,
        additions: Additions,
    }

    const CONFIG: &str =
        "[model.a]\npath = \"store:m\"\n[model.b]\npath = \"store:m\"\n[model.c]\npath = \"/c.gguf\"\n";

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mut config: Config = toml::from_str(CONFIG).unwrap();
            config.models.dir = Some(dir.path().join("models"));
            config.models.max_bytes.0 = 1 << 20;
            let additions = Additions::new(&config, &Paths::of(&config));
            Self { additions, dir }
        }

        fn add(&self, name: &str, bytes: &[u8], sha256: Option<String>) -> Result<AddedModel, AddFailure> {
            self.add_until(name, bytes, sha256, &mut |_| ControlFlow::Continue(()))
        }

        fn add_until(
            &self,
            name: &str,
            bytes: &[u8],
            sha256: Option<String>,
            step: &mut dyn FnMut(AddStep) -> ControlFlow<()>,
        ) -> Result<AddedModel, AddFailure> {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            let model = NewModel { file, name: name.to_owned(), sha256, origin: "a test".to_owned() };
            self.additions.add(model, step)
        }

        fn left(&self) -> usize {
            let count = |folder: &str| {
                std::fs::read_dir(self.dir.path().join("models").join(folder)).map_or(0, Iterator::count)
            };
            count("partial") + count("blobs") + count("names")
        }
    }

    /// A model that is served, and its digest.
    fn served() -> (Vec<u8>, String) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/v32/model.gguf");
        let bytes = std::fs::read(path).unwrap();
        let digest = Digest::of(&bytes).to_string();
        (bytes, digest)
    }

    #[test]
    fn a_model_is_in_the_store_with_its_digest_and_what_serves_it_is_said() {
        let (bench, (bytes, digest)) = (Bench::new(), served());
        let added = bench.add("m", &bytes, Some(digest.to_ascii_uppercase())).unwrap();
        assert_eq!((added.sha256.as_str(), added.bytes), (digest.as_str(), bytes.len() as u64));
        assert_eq!((added.served_as, added.not_served), (vec!["a".to_owned(), "b".to_owned()], None));
        let entry = bench.additions.store.entry("m").unwrap();
        assert_eq!((entry.sha256.to_string(), entry.source.as_str()), (digest, "a test"));
        bench.additions.store.verify("m", &entry, &mut |_| {}).unwrap();
        let other = bench.add("other", &bytes, None).unwrap();
        assert!(other.served_as.is_empty() && other.next.contains("[model.other] path = \"store:other\""));
        assert!(other.next.contains("restart"), "{}", other.next);
    }

    #[test]
    fn what_is_no_whole_gguf_or_another_file_leaves_nothing() {
        let (bench, (bytes, digest)) = (Bench::new(), served());
        for broken in [&bytes[..bytes.len() - 1], &bytes[..100], &bytes[1..], b"", b"GGUF"] {
            let refused = bench.add("m", broken, None).unwrap_err();
            assert!(matches!(refused, AddFailure::NoModel(_)), "{refused}");
            assert!(!refused.to_string().contains("partial"), "{refused}");
        }
        let refused = bench.add("m", &bytes, Some("0".repeat(64))).unwrap_err();
        assert_eq!(refused, AddFailure::OtherDigest { found: digest, wanted: "0".repeat(64) });
        let large = bench.add("m", &vec![0; (1 << 20) + 1], None).unwrap_err();
        assert_eq!(large, AddFailure::TooLarge { bytes: (1 << 20) + 1, limit: 1 << 20 });
        assert_eq!(bench.left(), 0);
    }

    #[test]
    fn a_gguf_that_this_version_cannot_serve_is_kept_and_it_is_said() {
        let bench = Bench::new();
        // A header without tensors and keys.
        let empty = [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &[0; 16]].concat();
        assert!(bench.add("m", &empty, None).unwrap().not_served.is_some());
    }

    #[test]
    fn who_wants_it_no_more_gets_nothing_and_leaves_nothing() {
        let (bench, (bytes, _)) = (Bench::new(), served());
        for last in [AddStage::Copying, AddStage::Verifying] {
            let stop = &mut |step: AddStep| {
                if step.stage == last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            assert_eq!(bench.add_until("m", &bytes, None, stop), Err(AddFailure::Stopped));
            assert_eq!(bench.left(), 0);
        }
    }

    #[test]
    fn names_and_digests_that_cannot_be_are_refused_before_a_file_is_looked_at() {
        let additions = Bench::new().additions;
        for (name, sha256, param) in [("../m", None, "name"), ("", None, "name"), ("m", Some("abc"), "sha256")] {
            let refused = additions.check(name, sha256).unwrap_err();
            assert!(matches!(refused, AddFailure::Invalid { param: found, .. } if found == param), "{refused}");
        }
        assert_eq!(additions.check("m", Some(&"a".repeat(64))), Ok(()));
    }

    #[test]
    fn a_store_of_another_user_is_said_to_be_one() {
        let bench = Bench::new();
        let denied = anyhow::Error::new(std::io::Error::from(ErrorKind::PermissionDenied)).context("models/lock");
        let said = bench.additions.failed(&denied).to_string();
        assert!(said.contains("models/lock") && said.contains("chown -R sparsed:"), "{said}");
    }

    #[test]
    fn what_a_daemon_has_left_that_was_killed_is_gone_after_the_next_start() {
        let bench = Bench::new();
        bench.additions.store.make().unwrap();
        let left = bench.dir.path().join("models/partial/descriptor.part");
        File::create(&left).unwrap();
        let mut config = Config::default();
        config.models.dir = Some(bench.dir.path().join("models"));
        drop(Additions::new(&config, &Paths::of(&config)));
        assert!(!left.exists());
    }
}
