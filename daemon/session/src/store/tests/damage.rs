//! What cannot be read, and what is kept of it.

use super::*;

#[test]
fn what_cannot_be_used_is_reported_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let ids: [SessionId; 4] = std::array::from_fn(|_| store.create(OWNER, &new(Durability::Turn), 5).unwrap());
    drop(store);
    let path = |id, name| file_of(folder.path(), id, name);
    let change = |id, name, at: usize, bits: u8| {
        let mut bytes = std::fs::read(path(id, name)).unwrap();
        bytes[at] ^= bits;
        std::fs::write(path(id, name), bytes).unwrap();
    };
    change(ids[0], "journal", 4, 3);
    change(ids[1], "journal", 50, 0xff);
    change(ids[2], "key", 79, 0xff);
    std::fs::remove_file(path(ids[3], "key")).unwrap();
    std::fs::create_dir(folder.path().join("sessions/lost+found")).unwrap();
    std::fs::create_dir_all(folder.path().join(format!("sessions/{OWNER}/{}.tmp", ids[0]))).unwrap();
    let (store, report) = open(folder.path(), 2);
    assert_eq!((report.sessions, store.list(OWNER).len()), (0, 0));
    let of = |name: String| report.findings.iter().find(|finding| finding.name == name).map(|finding| finding.kind);
    assert_eq!(of(ids[0].to_string()), Some(FindingKind::UnknownVersion { version: 2 }));
    assert_eq!(of(ids[1].to_string()), Some(FindingKind::Unreadable));
    assert_eq!(of(ids[2].to_string()), Some(FindingKind::Unreadable));
    assert_eq!(of(ids[3].to_string()), Some(FindingKind::Unreadable));
    assert_eq!(of("lost+found".into()), Some(FindingKind::Strange));
    assert_eq!(of(format!("{}.tmp", ids[0])), Some(FindingKind::Swept));
    assert!(path(ids[0], "journal").exists() && path(ids[2], "journal").exists() && path(ids[3], "journal").exists());
    drop(store);
    // The master key is named in the file: what it is not the key of is not damage.
    let master = MasterKey::new([2; 32]);
    let (mut store, report) =
        Store::open(OsDisk::open(folder.path()).unwrap(), random(3), master, Limits::default()).unwrap();
    assert_eq!(report.count(|kind| kind == FindingKind::ForeignKey), 3);
    assert_eq!((store.usage().sessions, store.usage().of_other_key), (0, 3));
    // One of them is damaged in its key.
    let of = |store: &mut Store<OsDisk>, key: u8| store.of_key(&report, &MasterKey::new([key; 32])).len();
    assert_eq!((of(&mut store, 1), of(&mut store, 2), of(&mut store, 4)), (2, 0, 0));
}

#[test]
fn a_session_that_a_newer_version_has_gone_on_with_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1], &[2]);
    let session = &store.sessions[&id];
    let (mut position, journal) = (session.journal.position, file_of(folder.path(), id, "journal"));
    let mut bytes = std::fs::read(&journal).unwrap();
    // A kind that comes after all that there are.
    position.append_text(vec![99, 7], &session.key, [3; NONCE_BYTES], &mut bytes);
    position.append(&Record::Tokens(vec![4]), &session.key, [4; NONCE_BYTES], &mut bytes);
    drop(store);
    std::fs::write(&journal, &bytes).unwrap();
    let (store, report) = open(folder.path(), 2);
    assert_eq!((report.sessions, store.list(OWNER).len()), (0, 0));
    assert_eq!(report.findings[0].kind, FindingKind::UnknownRecord);
    assert_eq!(std::fs::read(&journal).unwrap(), bytes);
    assert!(!file_of(folder.path(), id, "journal.cut").exists());
}

#[test]
fn damage_in_the_middle_is_cut_kept_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &[1], &[2]);
    let n_whole = usize::try_from(store.usage().journal_bytes).unwrap();
    say(&mut store, id, &[3], &[4]);
    drop(store);
    let journal = file_of(folder.path(), id, "journal");
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes[n_whole + 20] ^= 1;
    std::fs::write(&journal, &bytes).unwrap();
    let (mut store, report) = open(folder.path(), 2);
    let n_bytes = (bytes.len() - n_whole) as u64;
    assert_eq!(report.findings[0].kind, FindingKind::Cut { n_bytes, n_kept: n_bytes });
    assert_eq!(store.history(OWNER, id).unwrap().tokens, [1, 2]);
    assert!(store.summary(OWNER, id).unwrap().damaged);
    assert_eq!(std::fs::read(file_of(folder.path(), id, "journal.cut")).unwrap(), bytes[n_whole..]);
    say(&mut store, id, &[5], &[6]);
    drop(store);
    let (mut store, report) = open(folder.path(), 3);
    assert_eq!((store.history(OWNER, id).unwrap().tokens.len(), report.findings.len()), (4, 0));
}

#[test]
fn what_each_damage_has_cut_is_kept_beside_the_others_up_to_a_limit() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(folder.path(), 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    let journal = file_of(folder.path(), id, "journal");
    let mut evidence: Vec<Vec<u8>> = Vec::new();
    for cut in 0..20 {
        let n_whole = usize::try_from(store.usage().journal_bytes).unwrap();
        say(&mut store, id, &[cut], &[2]);
        drop(store);
        let mut bytes = std::fs::read(&journal).unwrap();
        // The length of a record, which says more than there is.
        bytes[n_whole + 2] ^= 1;
        std::fs::write(&journal, &bytes).unwrap();
        let (again, report) = open(folder.path(), 2);
        store = again;
        let n_bytes = (bytes.len() - n_whole) as u64;
        let n_kept = if cut < 16 { n_bytes } else { 0 };
        assert_eq!(report.findings[0].kind, FindingKind::Cut { n_bytes, n_kept }, "cut {cut}");
        evidence.push(bytes[n_whole..].to_vec());
    }
    for (at, bytes) in evidence.iter().enumerate().take(16) {
        let name = if at == 0 { "journal.cut".to_owned() } else { format!("journal.cut.{at}") };
        assert_eq!(std::fs::read(file_of(folder.path(), id, &name)).unwrap(), *bytes, "{name}");
    }
    assert!(store.summary(OWNER, id).unwrap().damaged);
    store.delete(OWNER, id).unwrap();
    assert_eq!(std::fs::read_dir(folder.path().join(format!("sessions/{OWNER}"))).unwrap().count(), 0);
}
