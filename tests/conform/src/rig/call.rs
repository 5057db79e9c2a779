//! How does a call's status become a sentence?

use sparsed_abi::{OK, SpdError, SpdStatus, status_name};
use std::ffi::c_char;
use std::fmt;

/// A call that failed.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) call: &'static str,
    pub(crate) status: SpdStatus,
    pub(crate) message: String,
    /// `spd_error.block`, for what lies in the slow tier.
    pub(crate) block: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answers {}", self.call, status_name(self.status))?;
        if self.message.is_empty() { Ok(()) } else { write!(f, " ({})", self.message) }
    }
}

/// Takes a function out of the table; [`super::table`] has refused a table with a hole.
macro_rules! entry {
    ($api:expr, $name:ident) => {
        $api.$name.expect("a table with a hole is refused before anything is called")
    };
}
pub(crate) use entry;

/// An error struct as a caller hands it over.
pub(crate) fn fresh_error() -> SpdError {
    SpdError { struct_size: struct_size::<SpdError>(), op_index: u32::MAX, ..SpdError::default() }
}

/// Runs `call` with an error of its own to fill.
pub(crate) fn call(name: &'static str, call: impl FnOnce(*mut SpdError) -> SpdStatus) -> Result<(), Fault> {
    let mut error = fresh_error();
    let status = call(&raw mut error);
    if status == OK {
        Ok(())
    } else {
        Err(Fault { call: name, status, message: text(&error.message), block: error.block })
    }
}

/// The size a struct of the border says it has.
pub(crate) fn struct_size<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("structs of the border are small")
}

/// A fixed-size field up to its NUL as text; what is not UTF-8 is replaced.
pub(crate) fn text(field: &[c_char]) -> String {
    let bytes: Vec<u8> = field.iter().take_while(|&&c| c != 0).flat_map(|c| c.to_ne_bytes()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
