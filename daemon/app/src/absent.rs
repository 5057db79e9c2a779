//! What becomes of a model whose file is not there when the daemon starts? The daemon serves without it, says what is
//! missing, and loads it once it is there: a package may bring it later, or `sparsectl model pull`.

use crate::assemble::is_packaged;
use crate::config::{Config, LoadWhen, Model, Paths};
use crate::store::{ModelAtPath, Store};
use sparsed_engine::api::Owner;
use sparsed_engine::{DEFAULT_MODEL, ModelSource, Service};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Pause between looks for what is missing. Longer than the engine waits before it tries a model again that has failed.
const PAUSE: Duration = Duration::from_secs(6);

/// A model that was to be loaded at the start.
#[derive(Debug)]
pub(crate) struct Absent {
    name: String,
    store: Store,
    places: Vec<PathBuf>,
}

impl Absent {
    /// Those of `models` that are missing.
    pub(crate) fn of(config: &Config, paths: &Paths, models: &BTreeMap<String, Model>) -> Vec<Self> {
        let wanted = models.iter().filter(|(_, model)| model.load == LoadWhen::Start);
        let absent = wanted.map(|(name, model)| Self {
            name: name.clone(),
            store: Store::at(&paths.models_dir),
            places: if is_packaged(config, name) { paths.default_models.to_vec() } else { vec![model.path.clone()] },
        });
        absent.filter(|absent| !absent.is_there()).collect()
    }

    /// The model's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn is_there(&self) -> bool {
        self.places.iter().any(|place| self.store.resolve(place).exists())
    }
}

/// The packaged model, wherever it is when it is to be loaded.
#[derive(Debug)]
pub(crate) struct Packaged {
    pub(crate) paths: Paths,
    /// Where it is remembered which files were verified.
    pub(crate) remembered: PathBuf,
}

impl ModelSource for Packaged {
    fn locate(&self) -> Result<PathBuf, String> {
        ModelAtPath::new(self.paths.default_model(), DEFAULT_MODEL, Some(self.remembered.clone())).locate()
    }
}

/// Has the models loaded when they are there. Ends with the last of them.
pub(crate) async fn load(service: Service, mut absent: Vec<Absent>) {
    let me = Owner::Uid(rustix::process::getuid().as_raw());
    for model in &absent {
        let places: Vec<_> = model.places.iter().map(|place| place.display().to_string()).collect();
        log::warn!(
            model:% = model.name, places:% = places.join(", ");
            "the model is not there; it is loaded when it comes"
        );
        // So that whoever asks hears why there is none.
        if let Ok(arriving) = service.hold(me, &model.name) {
            let _refused = arriving.await.is_err();
        }
    }
    while !absent.is_empty() {
        tokio::time::sleep(PAUSE).await;
        let mut left = Vec::new();
        for model in absent {
            let arriving = if model.is_there() { service.hold(me, &model.name).ok() } else { None };
            match arriving {
                Some(arriving) => match arriving.await {
                    Ok(_held) => log::info!(model:% = model.name; "the model is there now"),
                    // It is looked at again: it may not have been whole yet.
                    Err(_said) => left.push(model),
                },
                None => left.push(model),
            }
        }
        absent = left;
    }
}
