//! Which device do calls mean, and has it been lost? The primary context of a device, and the latch of its errors.

use super::error::{describe, is_sticky, status};
use super::table::{Code, Driver, Handle};
use sparsed_abi::E_DEVICE_LOST;
use sparsed_plugin_kit::{PluginError, Result};
use std::ffi::c_int;
use std::sync::{Arc, OnceLock};

/// A device's primary context, retained until dropped.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) driver: Arc<Driver>,
    raw: Handle,
    device: c_int,
    /// The first sticky error: its number, and what happened.
    lost: OnceLock<(Code, String)>,
}

// SAFETY: a context may be current in several threads at once; the driver locks inside.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of `device`.
    ///
    /// # Errors
    /// The driver's own.
    pub(crate) fn retain(driver: &Arc<Driver>, device: c_int) -> Result<Arc<Self>> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the driver is initialised; the out pointer is ours.
        let code = unsafe { (driver.primary_ctx_retain)(&raw mut raw, device) };
        if code != 0 {
            let message = describe(driver, code, "cuDevicePrimaryCtxRetain");
            return Err(PluginError::new(status(code), message).with_vendor_code(code.into()));
        }
        Ok(Arc::new(Self { driver: Arc::clone(driver), raw, device, lost: OnceLock::new() }))
    }

    /// Makes the context current in this thread, which every other call needs. The daemon's threads are many, and
    /// nobody else uses CUDA in them, so nothing is restored.
    ///
    /// # Errors
    /// `SPD_E_DEVICE_LOST` once a sticky error has been seen: the driver would only repeat it.
    pub(crate) fn enter(&self) -> Result<()> {
        if let Some((code, message)) = self.lost.get() {
            return Err(lost(*code, message));
        }
        // SAFETY: the context is retained.
        self.check(unsafe { (self.driver.ctx_set_current)(self.raw) }, "cuCtxSetCurrent")
    }

    /// As [`Self::enter`] on the way out, when the device may be lost and nobody is there to be told.
    pub(crate) fn enter_to_free(&self) {
        // SAFETY: the context is retained. A failure makes the calls after it fail too, which free nothing then.
        unsafe { (self.driver.ctx_set_current)(self.raw) };
    }

    /// Turns the driver's answer into ours; a sticky error is remembered.
    ///
    /// # Errors
    /// What the answer means, with the driver's number.
    pub(crate) fn check(&self, code: Code, call: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let message = describe(&self.driver, code, call);
        if is_sticky(code) {
            let (code, message) = self.lost.get_or_init(|| (code, message));
            return Err(lost(*code, message));
        }
        Err(PluginError::new(status(code), message).with_vendor_code(code.into()))
    }

    /// True once a sticky error has been seen.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    /// Waits for all work of the context.
    ///
    /// # Errors
    /// The driver's own, or that of the work.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the context is current.
        self.check(unsafe { (self.driver.ctx_synchronize)() }, "cuCtxSynchronize")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by this value; everything made in it holds an Arc of it and is gone.
        unsafe { (self.driver.primary_ctx_release)(self.device) };
    }
}

fn lost(code: Code, message: &str) -> PluginError {
    PluginError::new(E_DEVICE_LOST, format!("the device is lost: {message}")).with_vendor_code(code.into())
}
