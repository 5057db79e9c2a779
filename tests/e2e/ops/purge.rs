//! What does purging the package leave? What is somebody else's, though it lies in our place.

use sparsed_tests::{root, skipped};
use std::path::Path;
use std::process::Command;

/// Has the package's script clear a folder away, after `first`, in a mount namespace of its own if it `mounts`.
fn clear_away(folder: &Path, first: &str, mounts: bool) {
    let script = std::fs::read_to_string(root().join("packaging/debian/postrm")).unwrap();
    let (_, function) = script.split_once("clear_away() {").unwrap();
    let (function, _) = function.split_once("\n}\n").unwrap();
    let mut command = Command::new(if mounts { "unshare" } else { "sh" });
    command.args(if mounts { &["-m", "sh"][..] } else { &[] });
    command.args(["-ec", &format!("clear_away() {{{function}\n}}\n{first}\nclear_away \"$PWD/$1\"\n"), "sh"]);
    let done = command.arg(folder.file_name().unwrap()).current_dir(folder.parent().unwrap()).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn purging_removes_a_folder_with_what_is_in_it_and_of_a_link_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let [folder, link, elsewhere] = ["state", "link", "elsewhere"].map(|name| dir.path().join(name));
    for folder in [&folder, &elsewhere] {
        std::fs::create_dir_all(folder.join("a b/.c")).unwrap();
        std::fs::write(folder.join("a b/file"), "x").unwrap();
    }
    std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
    std::os::unix::fs::symlink(&elsewhere, folder.join("a b/link")).unwrap();
    for gone in [&folder, &link] {
        clear_away(gone, "", false);
        assert!(gone.symlink_metadata().is_err(), "{}", gone.display());
    }
    assert!(elsewhere.join("a b/file").exists() && elsewhere.join("a b/.c").exists());
    clear_away(&folder, "", false);
}

#[test]
fn purging_empties_a_mount_and_leaves_what_is_mounted_below_it() {
    if !Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|status| status.success()) {
        return skipped("purging mounts", "this user may not mount a disk");
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    for folder in ["state/my models", "state/tmp", "models"] {
        std::fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    for file in ["models/theirs", "state/ours"] {
        std::fs::write(dir.path().join(file), "x").unwrap();
    }
    // One of the same disk, which no device tells, and one of another.
    let mounts = "mount --bind state state; mount --bind models 'state/my models'; mount -t tmpfs none state/tmp; \
                  touch state/tmp/theirs";
    clear_away(&state, mounts, true);
    assert!(dir.path().join("models/theirs").exists());
    let mut left: Vec<_> = state.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["my models", "tmp"]);
}
