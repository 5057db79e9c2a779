//! KV files that another version, another machine or another model has made.

use super::*;
use crate::image::KvFault;
use crate::suite::Suite;

/// The cipher that this machine would not choose.
fn other_suite() -> Suite {
    match Suite::fastest() {
        Suite::Aes256Gcm => Suite::ChaCha20Poly1305,
        Suite::ChaCha20Poly1305 => Suite::Aes256Gcm,
    }
}

fn image(index: u32) -> Vec<u8> {
    vec![u8::try_from(index + 3).unwrap(); 5000]
}

/// A session with two full blocks, of whose images none is there.
fn session(folder: &Path) -> SessionId {
    let (mut store, _) = open(folder, 1);
    let id = store.create(OWNER, &new(Durability::Turn), 5).unwrap();
    say(&mut store, id, &(0..130).collect::<Vec<u32>>(), &[4]);
    id
}

/// Which of the two images come back; what comes is right.
fn loaded(store: &mut Store<OsDisk>, id: SessionId) -> [bool; 2] {
    [0, 1].map(|index| {
        let mut bytes = vec![9; 12_000];
        let is_there = store.load_block(OWNER, id, &SHAPE, index, &mut bytes).unwrap() == Loaded::Image;
        assert_eq!(bytes, if is_there { image(index) } else { Vec::new() }, "block {index}");
        is_there
    })
}

fn save_all(store: &mut Store<OsDisk>, id: SessionId) {
    for index in 0..2 {
        store.save_block(OWNER, id, &SHAPE, index, &image(index)).unwrap();
    }
}

fn header_of(folder: &Path, id: SessionId) -> Option<(ImageShape, Suite)> {
    ImageShape::parse(&std::fs::read(file_of(folder, id, "kv")).unwrap()).ok()
}

/// A folder that has moved: this machine's processor is good at the other cipher.
#[test]
fn a_file_in_the_cipher_of_another_machine_is_read_and_goes_on_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let id = session(folder.path());
    // What that machine would have written before its first image.
    std::fs::write(file_of(folder.path(), id, "kv"), SHAPE.header(other_suite())).unwrap();
    let (mut store, report) = open(folder.path(), 2);
    assert_eq!(report.findings, []);
    store.save_block(OWNER, id, &SHAPE, 0, &image(0)).unwrap();
    drop(store);
    let (mut store, _) = open(folder.path(), 3);
    assert_eq!(loaded(&mut store, id), [true, false]);
    store.save_block(OWNER, id, &SHAPE, 1, &image(1)).unwrap();
    drop(store);
    let (mut store, _) = open(folder.path(), 4);
    assert_eq!(loaded(&mut store, id), [true, true]);
    assert_eq!(header_of(folder.path(), id), Some((SHAPE, other_suite())));
}

/// As if somebody had put a file's beginning before another's images: nothing of it opens, and nothing of it is lost
/// but time.
#[test]
fn images_in_another_cipher_than_their_file_says_are_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let id = session(folder.path());
    let (mut store, _) = open(folder.path(), 2);
    save_all(&mut store, id);
    drop(store);
    let kv = file_of(folder.path(), id, "kv");
    let mut bytes = std::fs::read(&kv).unwrap();
    let header = SHAPE.header(other_suite());
    bytes[..header.len()].copy_from_slice(&header);
    std::fs::write(&kv, bytes).unwrap();
    let (mut store, report) = open(folder.path(), 3);
    assert_eq!((report.findings.len(), loaded(&mut store, id)), (0, [false, false]));
    assert_eq!(store.saved_blocks(OWNER, id, &SHAPE), Ok(0), "they are not tried again");
    save_all(&mut store, id);
    drop(store);
    assert_eq!(loaded(&mut open(folder.path(), 4).0, id), [true, true]);
}

/// Each header is whole: its CRC says that it is what was written.
#[test]
fn a_file_of_another_version_or_of_a_cipher_that_nobody_knows_yet_is_dropped_and_made_anew() {
    let number = |at: usize, number: u32| {
        let mut header = SHAPE.header(Suite::fastest()).to_vec();
        header[at..at + 4].copy_from_slice(&number.to_le_bytes());
        let crc = crc32c::crc32c(&header[..48]);
        header[48..].copy_from_slice(&crc.to_le_bytes());
        header
    };
    let (version, cipher) = (4, 44);
    for (at, other, fault) in [
        (version, 1, KvFault::Version(1)),
        (version, 3, KvFault::Version(3)),
        (version, u32::MAX, KvFault::Version(u32::MAX)),
        (cipher, 0, KvFault::Cipher(0)),
        (cipher, 3, KvFault::Cipher(3)),
        (cipher, u32::MAX, KvFault::Cipher(u32::MAX)),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let id = session(folder.path());
        let (mut store, _) = open(folder.path(), 2);
        save_all(&mut store, id);
        let said = store.history(OWNER, id).unwrap().clone();
        drop(store);
        let kv = file_of(folder.path(), id, "kv");
        let mut bytes = std::fs::read(&kv).unwrap();
        let header = number(at, other);
        bytes[..header.len()].copy_from_slice(&header);
        std::fs::write(&kv, bytes).unwrap();
        let (mut store, report) = open(folder.path(), 3);
        assert_eq!((report.findings.len(), store.saved_blocks(OWNER, id, &SHAPE)), (0, Ok(0)), "{other} at {at}");
        assert_eq!((store.take_dropped(), store.take_dropped()), (vec![(id, fault)], Vec::new()));
        assert_eq!(loaded(&mut store, id), [false, false], "{other} at {at}");
        assert!(!kv.exists(), "it takes no room for nothing");
        assert_eq!(store.history(OWNER, id).unwrap(), &said, "{other} at {at}");
        save_all(&mut store, id);
        drop(store);
        assert_eq!(loaded(&mut open(folder.path(), 4).0, id), [true, true], "{other} at {at}");
        assert_eq!(header_of(folder.path(), id), Some((SHAPE, Suite::fastest())), "{other} at {at}");
    }
}

/// As many bytes in a block, and other rows in it: another model, or the same one with other formats.
#[test]
fn a_file_of_another_models_rows_is_not_believed_by_either() {
    let folder = tempfile::tempdir().unwrap();
    let id = session(folder.path());
    let (mut store, _) = open(folder.path(), 2);
    save_all(&mut store, id);
    drop(store);
    for other in [ImageShape { fingerprint: [6; 32], ..SHAPE }, ImageShape { block_bytes: 4000, ..SHAPE }] {
        let (mut store, _) = open(folder.path(), 3);
        assert_eq!(store.saved_blocks(OWNER, id, &other), Ok(0));
        assert_eq!(store.take_dropped(), [(id, KvFault::Shape)]);
        let bytes = vec![7; other.block_bytes as usize];
        store.save_block(OWNER, id, &other, 0, &bytes).unwrap();
        drop(store);
        let (mut store, _) = open(folder.path(), 4);
        assert_eq!(loaded(&mut store, id), [false, false], "{other:?}");
        save_all(&mut store, id);
        assert_eq!(loaded(&mut store, id), [true, true], "{other:?}");
    }
}
