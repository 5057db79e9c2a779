//! What may the daemon's user do with a file? Asked by another user, who may do more or less.

use rustix::fs::Access;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The user of the service.
pub(super) const USER: &str = "sparsed";
/// Bits of a mode, of the last three.
pub(super) const READ_AND_WRITE: u32 = 0o6;
const READ: u32 = 0o4;
const PASS: u32 = 0o1;

/// What keeps the daemon's user from reading `file`: itself, or the first folder above it that is shut.
pub(super) fn shut_at<'a>(root: &Path, file: &'a Path, groups: &[String]) -> Option<&'a Path> {
    let mut above: Vec<&Path> = file.ancestors().skip(1).collect();
    above.reverse();
    let shut = above.into_iter().find(|folder| !may(root, folder, PASS, groups));
    shut.or_else(|| (!may(root, file, READ, groups)).then_some(file))
}

/// Whether the daemon's user, who is of these groups in its service, may do with `path` what `bits` say; where there is
/// no such user, whether whoever asks may.
pub(super) fn may(root: &Path, path: &Path, bits: u32, groups: &[String]) -> bool {
    let (Some((uid, gid)), Ok(found)) = (user(root), path.metadata()) else {
        let access = [(0o4, Access::READ_OK), (0o2, Access::WRITE_OK), (0o1, Access::EXEC_OK)];
        let access = access.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, access)| access);
        return rustix::fs::access(path, access.collect()).is_ok();
    };
    let allows = |shift: u32| found.mode() >> shift & bits == bits;
    match found {
        _ if found.uid() == uid => allows(6),
        _ if found.gid() == gid || is_member(root, found.gid(), groups) => allows(3),
        _ => allows(0),
    }
}

/// Ids of the daemon's user and of its first group, if it is a user of this box.
fn user(root: &Path) -> Option<(u32, u32)> {
    let text = fs::read_to_string(root.join("etc/passwd")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(USER)?.strip_prefix(':'))?;
    let mut ids = line.split(':').skip(1);
    Some((ids.next()?.parse().ok()?, ids.next()?.parse().ok()?))
}

fn is_member(root: &Path, gid: u32, groups: &[String]) -> bool {
    let is_one =
        |(name, members): (String, Vec<String>)| groups.contains(&name) || members.iter().any(|member| member == USER);
    groups.iter().any(|group| group.parse() == Ok(gid)) || group_of(root, gid).is_some_and(is_one)
}

/// A group's name and members.
pub(super) fn group_of(root: &Path, gid: u32) -> Option<(String, Vec<String>)> {
    let text = fs::read_to_string(root.join("etc/group")).ok()?;
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let (name, id, members) = (parts.next()?, parts.nth(1)?, parts.next()?);
        (id.parse() == Ok(gid)).then(|| (name.to_owned(), members.split(',').map(str::to_owned).collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_keeps_the_daemons_user_from_a_file_is_told_folders_first() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        // Nobody here: neither the owner of these files nor of their group.
        fs::write(root.path().join("etc/passwd"), format!("{USER}:x:4294967:4294967::/:/\n")).unwrap();
        fs::write(root.path().join("etc/group"), "").unwrap();
        let folder = root.path().join("conf.d");
        let file = folder.join("limits.toml");
        fs::create_dir(&folder).unwrap();
        fs::write(&file, "").unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        set(root.path(), 0o755);
        set(&folder, 0o755);
        set(&file, 0o644);
        // Folders above this test's may be shut to others.
        let shut = |file: &Path| {
            shut_at(root.path(), file, &[]).filter(|path| path.starts_with(root.path())).map(Path::to_owned)
        };
        assert_eq!(shut(&file), None);
        set(&file, 0o600);
        assert!(!may(root.path(), &file, READ, &[]) && may(root.path(), &folder, PASS, &[]));
        set(&folder, 0o700);
        assert!(!may(root.path(), &folder, PASS, &[]));
    }
}
