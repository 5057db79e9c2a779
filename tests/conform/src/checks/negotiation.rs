//! L1: is there a table, and is it the right one?

use crate::child::Context;
use crate::rig;
use crate::rule::{Level, Rule, rule};
use crate::verdict::{Outcome, ensure};
use sparsed_abi::{ABI_MAJOR, ABI_MINOR, LAYOUT_DIGEST, SpdApi};
use std::ffi::{CStr, c_char};

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L1,
        "load.opens",
        "the library is the manifest's, loads, and answers a table for this ABI",
        "plugin.h, spd_get_api",
        &[],
        load_opens,
    ),
    rule(
        Level::L1,
        "abi.layout",
        "the plugin's compiler saw every field where this header has it",
        "plugin.h, SPD_LAYOUT",
        &[],
        layout,
    ),
    rule(Level::L1, "abi.table_whole", "every pointer up to extension is set", "plugin.h, spd_api", &[], table_whole),
    rule(
        Level::L1,
        "abi.unknown_major",
        "spd_get_api answers NULL for a major that it does not speak",
        "plugin.h, spd_get_api",
        &[],
        unknown_major,
    ),
    rule(
        Level::L1,
        "abi.table_static",
        "spd_get_api answers the same table each time, for older and newer hosts of its major",
        "plugin.h, spd_api",
        &[],
        table_static,
    ),
    rule(
        Level::L1,
        "abi.identity",
        "the table has the manifest's id and version, and needs no feature that no host has",
        "plugin.h, spd_api",
        &[],
        identity,
    ),
];

fn ask(context: &Context, major: u32, minor: u32) -> *const SpdApi {
    // SAFETY: the header's entry takes any numbers, and answers NULL or a static table.
    unsafe { (context.entry)(major, minor) }
}

fn load_opens(context: &Context) -> Outcome {
    rig::readable_table(context.entry).map(drop)
}

fn layout(context: &Context) -> Outcome {
    let found = rig::readable_table(context.entry)?.layout;
    ensure!(
        found == LAYOUT_DIGEST,
        "layout is {found:#018x}, SPD_LAYOUT of this header is {LAYOUT_DIGEST:#018x}: the plugin's header was changed \
         otherwise than by appending"
    );
    Ok(())
}

fn table_whole(context: &Context) -> Outcome {
    let hole = rig::hole(&rig::readable_table(context.entry)?);
    ensure!(hole.is_none(), "{} is NULL", hole.unwrap_or_default());
    Ok(())
}

fn unknown_major(context: &Context) -> Outcome {
    for major in [ABI_MAJOR + 1, ABI_MAJOR + 2, u32::MAX] {
        let api = ask(context, major, 0);
        ensure!(api.is_null(), "spd_get_api({major}, 0) answers a table; it must answer NULL");
    }
    Ok(())
}

fn table_static(context: &Context) -> Outcome {
    let first = ask(context, ABI_MAJOR, ABI_MINOR);
    ensure!(ask(context, ABI_MAJOR, ABI_MINOR) == first, "the second call answers another table");
    for minor in [0, ABI_MINOR + 1, u32::MAX] {
        let api = ask(context, ABI_MAJOR, minor);
        ensure!(api == first, "a host of minor {minor} is answered another table, or none");
    }
    Ok(())
}

fn identity(context: &Context) -> Outcome {
    let (api, manifest) = (rig::table(context.entry)?, &context.found.manifest);
    let text = |at: *const c_char| {
        // SAFETY: not NULL, which table() has checked; the header says static NUL-terminated strings.
        unsafe { CStr::from_ptr(at) }.to_string_lossy()
    };
    let (id, version) = (text(api.plugin_id), text(api.plugin_version));
    ensure!(id == manifest.id, "plugin_id is '{id}', plugin.toml says '{}'", manifest.id);
    ensure!(version == manifest.version, "plugin_version is '{version}', plugin.toml says '{}'", manifest.version);
    ensure!(api.required_host_features == 0, "required_host_features is {:#x}", api.required_host_features);
    Ok(())
}
