//! What crosses the border, as Rust values: errors out, host services and step arguments in.

use sparsed_abi::{E_INTERNAL, E_INVALID, E_UNSUPPORTED, OK, SpdError, SpdHost, SpdStatus, StepArrays};
use std::ffi::{CStr, CString, c_char, c_void};
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};

/// A failure on its way to the caller's `spd_error`.
#[derive(Clone, Debug)]
pub struct PluginError {
    /// `SPD_E_*`
    pub status: SpdStatus,
    /// For people; cut at 223 bytes.
    pub message: String,
    /// The operator that failed, if one did.
    pub op_index: Option<u32>,
    /// The block whose slow pages are bad, with `SPD_E_DATA`.
    pub block: Option<u32>,
    /// What the driver said, as a number of its own; 0: it said nothing.
    pub vendor_code: i64,
}

impl PluginError {
    /// A failure with this status.
    pub fn new(status: SpdStatus, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), op_index: None, block: None, vendor_code: 0 }
    }

    /// The caller broke the contract.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(E_INVALID, message)
    }

    /// The plugin does not have this.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(E_UNSUPPORTED, message)
    }

    /// The same failure, with the driver's own number for it.
    #[must_use]
    pub fn with_vendor_code(mut self, code: i64) -> Self {
        self.vendor_code = code;
        self
    }

    /// The same failure, because of what the slow tier has of `block`.
    #[must_use]
    pub fn of_block(mut self, block: u32) -> Self {
        self.block = Some(block);
        self
    }

    /// The same failure, at operator `index`.
    #[must_use]
    pub fn at(mut self, index: usize) -> Self {
        self.op_index = u32::try_from(index).ok();
        self
    }
}

impl std::fmt::Display for PluginError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, sparsed_abi::status_name(self.status))
    }
}

impl std::error::Error for PluginError {}

/// The daemon's services.
#[derive(Clone, Debug)]
pub struct Host(*const SpdHost);

// SAFETY: the header says that the table lives as long as the instance and that its functions are `[any]`.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    /// No services: no setting is there, and nobody reads the log.
    pub const fn none() -> Self {
        Self(std::ptr::null())
    }

    pub(crate) fn new(raw: *const SpdHost) -> Self {
        Self(raw)
    }

    /// The operator's setting `key` for this plugin.
    pub fn config(&self, key: &CStr) -> Option<String> {
        // SAFETY: the table is alive, see above.
        let host = unsafe { self.0.as_ref() }?;
        // SAFETY: the context goes back as given; the key is a C string.
        let value = unsafe { host.config?(host.context, key.as_ptr()) };
        // SAFETY: the header says NULL or a string that lives as long as the instance.
        (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) }.to_string_lossy().into_owned())
    }

    /// Writes a line to the daemon's log; `level` is `LOG_*`.
    pub fn log(&self, level: i32, message: &str) {
        // SAFETY: the table is alive, see above.
        let Some(host) = (unsafe { self.0.as_ref() }) else { return };
        if let (Some(log), Ok(text)) = (host.log, CString::new(message)) {
            // SAFETY: target and message are C strings that outlive the call.
            unsafe { log(host.context, level, c"plugin".as_ptr(), text.as_ptr(), text.as_bytes().len() as u64) };
        }
    }
}

/// Where a weight's bytes come from.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub(crate) ptr: *const u8,
    pub(crate) length: usize,
    /// 0 or less: none.
    pub(crate) fd: i32,
    pub(crate) offset: u64,
}

impl Source {
    /// The bytes, valid during the upload.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the header says that `length` bytes at `ptr` are readable during the call; NULL was refused.
        unsafe { std::slice::from_raw_parts(self.ptr, self.length) }
    }

    /// The file in which the same bytes lie, if there is one, and where they begin in it.
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        // SAFETY: the header says that a positive fd is an open file during the call, which `self` is not kept past.
        (self.fd > 0).then(|| (unsafe { BorrowedFd::borrow_raw(self.fd) }, self.offset))
    }

    /// The bytes for as long as the weight lives.
    ///
    /// # Safety
    /// Only for a weight created with `SPD_W_HOST_IN_PLACE`, and not past its destruction: only then does the caller
    /// keep the bytes valid and unchanged for so long.
    pub unsafe fn bytes_in_place(&self) -> &'static [u8] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts(self.ptr, self.length) }
    }
}

/// The arguments of one step.
#[derive(Debug)]
pub struct Run<'a> {
    /// What it works on.
    pub step: StepArrays<'a>,
    /// The same as it came, for whoever passes it on.
    pub step_bytes: &'a [u8],
    /// INPUT tensors.
    pub input: &'a [u8],
    /// OUTPUT tensors.
    pub output: &'a mut [u8],
    pub(crate) cancel: Option<&'a AtomicU32>,
}

impl<'a> Run<'a> {
    /// A step that nobody will cancel. `step_bytes` is what `step` was read from.
    pub fn new(step: StepArrays<'a>, step_bytes: &'a [u8], input: &'a [u8], output: &'a mut [u8]) -> Self {
        Self { step, step_bytes, input, output, cancel: None }
    }

    /// The caller's flag, which it may set at any time; `None` when it never will.
    pub fn cancel_flag(&self) -> Option<&'a AtomicU32> {
        self.cancel
    }

    /// True once the caller wants the step to end.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed) != 0)
    }
}

/// The size that a struct of the border says it has.
pub fn struct_size<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("structs of the border are small")
}

/// Writes text into a fixed field, cut at a character so that it stays NUL-terminated UTF-8.
pub fn put_text(field: &mut [c_char], text: &str) {
    let mut end = text.len().min(field.len() - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in field.iter_mut().zip(text.as_bytes()[..end].iter().chain([&0])) {
        *to = c_char::from_ne_bytes([*from]); // signed on x86-64, unsigned on aarch64
    }
}

/// Runs the body of an entry: a panic becomes `SPD_E_INTERNAL`, an error is written to the caller's struct.
pub(crate) fn entry(error: *mut SpdError, body: impl FnOnce() -> crate::Result<()>) -> SpdStatus {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text =
            panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
        Err(PluginError::new(E_INTERNAL, format!("panic: {}", text.unwrap_or_default())))
    });
    let Err(failure) = outcome else { return OK };
    if !error.is_null() {
        let mut full = SpdError {
            struct_size: 0,
            status: failure.status,
            op_index: failure.op_index.unwrap_or(u32::MAX),
            block: failure.block.map_or(u64::MAX, u64::from),
            vendor_code: failure.vendor_code,
            ..SpdError::default()
        };
        put_text(&mut full.message, &failure.message);
        // SAFETY: the header says that error is NULL or points to a struct of the size it states.
        unsafe { write_out(error, full) };
    }
    failure.status
}

/// Copies `value` into the caller's struct, no further than the caller's `struct_size`, which is kept.
///
/// # Safety
/// `to` points to a struct that begins with its `struct_size` and has that many writable bytes.
pub(crate) unsafe fn write_out<T: Copy>(to: *mut T, value: T) {
    // SAFETY: the struct begins with a u32 size.
    let known = unsafe { to.cast::<u32>().read() } as usize;
    let length = known.min(size_of::<T>()).saturating_sub(4);
    let from = (&raw const value).cast::<u8>();
    // SAFETY: both sides have 4 + length bytes; the caller's size field is left alone.
    unsafe { std::ptr::copy_nonoverlapping(from.add(4), to.cast::<u8>().add(4), length) };
}

/// Reads the caller's struct: what it does not know reads as zero, what we do not know must be zero.
///
/// # Safety
/// `from` is NULL or points to a struct that begins with its `struct_size` and has that many readable bytes. All-zero
/// bytes are a value of `T`.
pub(crate) unsafe fn read_in<T: Copy + Default>(from: *const T) -> crate::Result<T> {
    if from.is_null() {
        return Err(PluginError::invalid("a mandatory argument is NULL"));
    }
    // SAFETY: the struct begins with a u32 size.
    let known = unsafe { from.cast::<u32>().read() } as usize;
    if !(8..=1 << 16).contains(&known) {
        return Err(PluginError::new(sparsed_abi::E_ABI, format!("struct_size {known} is not possible")));
    }
    // SAFETY: `known` bytes are readable.
    let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), known) };
    if bytes.iter().skip(size_of::<T>()).any(|&b| b != 0) {
        return Err(PluginError::new(sparsed_abi::E_ABI, "a field newer than this plugin is set"));
    }
    let mut value = T::default();
    // SAFETY: both sides have min(known, size) bytes; T takes the caller's bytes, which are fields of the same layout.
    unsafe {
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), (&raw mut value).cast::<u8>(), known.min(size_of::<T>()))
    };
    Ok(value)
}

/// Element `index` of a C array with this stride; read as [`read_in`] reads a struct.
///
/// # Safety
/// The array has more than `index` elements of `stride` readable bytes. All-zero bytes are a value of `T`.
pub(crate) unsafe fn element<T: Copy + Default>(array: *const T, stride: u32, index: usize) -> crate::Result<T> {
    if array.is_null() || stride < 8 {
        return Err(PluginError::invalid("an array is NULL, or its stride is too small"));
    }
    let stride = stride as usize;
    // SAFETY: inside the array by the caller's contract.
    let at = unsafe { array.cast::<u8>().add(index * stride) };
    // SAFETY: as above.
    let bytes = unsafe { std::slice::from_raw_parts(at, stride) };
    if bytes.iter().skip(size_of::<T>()).any(|&b| b != 0) {
        return Err(PluginError::new(sparsed_abi::E_ABI, "a field newer than this plugin is set"));
    }
    let mut value = T::default();
    // SAFETY: both sides have that many bytes; T takes the caller's bytes, which are fields of the same layout.
    unsafe { std::ptr::copy_nonoverlapping(at, (&raw mut value).cast::<u8>(), stride.min(size_of::<T>())) };
    Ok(value)
}

/// A reference to what a handle stands for.
///
/// # Safety
/// `handle` is NULL or came from `Box::into_raw` of a `T` and has not been destroyed.
pub(crate) unsafe fn borrow<'a, T>(handle: *const c_void) -> crate::Result<&'a T> {
    // SAFETY: the caller's contract.
    unsafe { handle.cast::<T>().as_ref() }.ok_or_else(|| PluginError::invalid("a handle is NULL"))
}
