//! The fake driver says no where it should: what the other tests rely on when they pass.

use crate::rig::{driver_folder, fake};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};

type Handle = *mut c_void;

/// A driver of its own, called as the plugin calls it.
struct Driver {
    loaded: libloading::Library,
    _dir: tempfile::TempDir,
}

macro_rules! calls {
    ($($method:ident = $symbol:literal ($($name:ident: $type:ty),*);)*) => {
        impl Driver {
            $(#[allow(clippy::too_many_arguments, reason = "the driver's")]
            fn $method(&self, $($name: $type),*) -> c_int {
                // SAFETY: the signature is the fake's; tests pass pointers to what is theirs.
                unsafe {
                    self.loaded.get::<unsafe extern "C" fn($($type),*) -> c_int>($symbol).unwrap()($($name),*)
                }
            })*
        }
    };
}

calls! {
    init = b"cuInit"(flags: c_uint);
    count = b"cuDeviceGetCount"(out: *mut c_int);
    retain = b"cuDevicePrimaryCtxRetain"(out: *mut Handle, device: c_int);
    set_current = b"cuCtxSetCurrent"(context: Handle);
    synchronize = b"cuCtxSynchronize"();
    alloc = b"cuMemAlloc_v2"(out: *mut u64, bytes: usize);
    free = b"cuMemFree_v2"(address: u64);
    copy_in = b"cuMemcpyHtoDAsync_v2"(to: u64, from: *const c_void, bytes: usize, stream: Handle);
    upload = b"cuMemcpyHtoD_v2"(to: u64, from: *const c_void, bytes: usize);
    pin = b"cuMemHostAlloc"(out: *mut Handle, bytes: usize, flags: c_uint);
    stream = b"cuStreamCreateWithPriority"(out: *mut Handle, flags: c_uint, priority: c_int);
    end_stream = b"cuStreamDestroy_v2"(stream: Handle);
    event = b"cuEventCreate"(out: *mut Handle, flags: c_uint);
    record = b"cuEventRecord"(event: Handle, stream: Handle);
    query = b"cuEventQuery"(event: Handle);
    end_event = b"cuEventDestroy_v2"(event: Handle);
    load = b"cuModuleLoadData"(out: *mut Handle, image: *const c_void);
    function = b"cuModuleGetFunction"(out: *mut Handle, module: Handle, name: *const c_char);
    launch = b"cuLaunchKernel"(
        function: Handle, x: c_uint, y: c_uint, z: c_uint, threads: c_uint, block_y: c_uint, block_z: c_uint,
        shared: c_uint, stream: Handle, parameters: *mut Handle, extra: *mut Handle
    );
}

impl Driver {
    fn new() -> Self {
        let dir = driver_folder();
        Self { loaded: fake(dir.path()), _dir: dir }
    }

    /// With the context current in this thread.
    fn started() -> Self {
        let (driver, mut context) = (Self::new(), null_mut());
        assert_eq!((driver.init(0), driver.retain(&raw mut context, 0), driver.set_current(context)), (0, 0, 0));
        driver
    }

    /// A stream, an event, and the kernel `add`.
    fn objects(&self) -> (Handle, Handle, Handle) {
        let (mut stream, mut event, mut module, mut add) = (null_mut(), null_mut(), null_mut(), null_mut());
        let image = c"sparsed-kernels 1\nadd 8 8 4 4 8 4 4 8 4 4 4\nother 8\n";
        assert_eq!((self.stream(&raw mut stream, 1, 0), self.event(&raw mut event, 2)), (0, 0));
        assert_eq!(self.load(&raw mut module, image.as_ptr().cast()), 0);
        assert_eq!(self.function(&raw mut add, module, c"add".as_ptr()), 0);
        assert_eq!(self.function(&mut null_mut(), module, c"absent".as_ptr()), 500, "not in the image");
        assert_eq!(self.function(&mut null_mut(), module, c"other".as_ptr()), 500, "no host function");
        (stream, event, add)
    }

    /// Launches `add` of one value with every address at `address`.
    fn add(&self, add: Handle, stream: Handle, grid: (c_uint, c_uint), threads: c_uint, address: u64) -> c_int {
        let words = [address, address, 1, 1, address, 1, 1, address, 1, 1, 1];
        let mut parameters = words.each_ref().map(|word: &u64| std::ptr::from_ref(word).cast_mut().cast());
        let parameters = parameters.as_mut_ptr();
        self.launch(add, grid.0, grid.1, 1, threads, 1, 1, 0, stream, parameters, null_mut())
    }
}

#[test]
fn nothing_works_before_init_or_without_a_context() {
    let (driver, mut n) = (Driver::new(), 0);
    assert_eq!(driver.count(&raw mut n), 3);
    assert_eq!(driver.init(0), 0);
    assert_eq!((driver.count(&raw mut n), n), (0, 1));
    assert_eq!(driver.alloc(&mut 0, 8), 201);
    let mut context = null_mut();
    assert_eq!((driver.retain(&raw mut context, 0), driver.set_current(context)), (0, 0));
    assert_eq!(driver.alloc(&mut 0, 8), 0);
    let elsewhere = std::thread::scope(|scope| scope.spawn(|| driver.alloc(&mut 0, 8)).join().unwrap());
    assert_eq!(elsewhere, 201, "a context is current in one thread only");
}

#[test]
fn freed_things_and_impossible_sizes_are_refused() {
    let (driver, mut address) = (Driver::started(), 0);
    let (stream, event, add) = driver.objects();
    assert_eq!(driver.alloc(&raw mut address, 0), 1);
    assert_eq!((driver.alloc(&raw mut address, 4), driver.free(address), driver.free(address)), (0, 0, 1));
    assert_eq!(driver.upload(address, [0u8; 4].as_ptr().cast(), 4), 1, "freed memory");
    assert_eq!(driver.alloc(&raw mut address, 1 << 40), 2);
    assert_eq!(driver.copy_in(address, [0u8; 4].as_ptr().cast(), 4, stream), 1, "pageable memory");
    assert_eq!(driver.add(add, stream, (0, 1), 1, address), 1);
    assert_eq!(driver.add(add, stream, (1, 65_536), 1, address), 1);
    assert_eq!(driver.add(add, stream, (1, 1), 1025, address), 1);
    assert_eq!((driver.end_event(event), driver.end_event(event), driver.query(event)), (0, 400, 400));
    assert_eq!((driver.end_stream(stream), driver.add(add, stream, (1, 1), 1, address)), (0, 400));
    assert_eq!(driver.load(&mut null_mut(), c"not ours".as_ptr().cast()), 218);
}

#[test]
fn work_is_not_over_when_it_is_enqueued_and_a_wild_address_ends_everything() {
    let (driver, mut address) = (Driver::started(), 0);
    let (stream, event, add) = driver.objects();
    let mut pinned = null_mut();
    assert_eq!((driver.pin(&raw mut pinned, 64, 3), driver.alloc(&raw mut address, 64)), (0, 0));
    for _ in 0..8 {
        assert_eq!(driver.copy_in(address, pinned, 64, stream), 0);
    }
    assert_eq!((driver.record(event, stream), driver.query(event)), (0, 600));
    assert_eq!((driver.synchronize(), driver.query(event)), (0, 0));
    // The launch itself is well-formed; the last value lies past the end of the allocation.
    assert_eq!(driver.add(add, stream, (1, 1), 1, address + 61), 0);
    assert_eq!(driver.synchronize(), 700);
    assert_eq!(
        (driver.alloc(&raw mut address, 8), driver.query(event), driver.retain(null::<Handle>().cast_mut(), 0)),
        (700, 700, 700)
    );
}
