//! What if memory gets short? It is told, with a headroom that has nothing to do with what is there.

use crate::daemon::World;
use crate::device::IMAGE_BYTES;
use crate::run::{Checked, Violation};
use sparsed_engine::memory::{Outlook, Pressure};
use std::time::Duration;

impl World {
    /// Memory gets short, or is not any more.
    pub(crate) fn look(&mut self) -> Checked {
        let pressure = [Pressure::None, Pressure::None, Pressure::Some, Pressure::Critical][self.rng.usize(..4)];
        let most = i64::from(self.setup.n_blocks * IMAGE_BYTES);
        let headroom_bytes = if self.rng.u32(..3) == 0 { i64::MAX } else { self.rng.i64(-most..most) };
        self.report(pressure, headroom_bytes);
        self.is_pressed = true;
        let moments = self.rng.u32(..80);
        self.pass(moments)
    }

    /// Time goes by in which the device does nothing, and everybody else what there is to do: a listener that is not
    /// slow is not kept waiting.
    fn pass(&mut self, moments: u32) -> Checked {
        for _ in 0..moments {
            self.now += Duration::from_millis(40);
            self.machine.sessions_turn(usize::MAX);
            self.machine.step(None, self.now).map_err(|error| Violation(format!("without a device: {error}")))?;
        }
        Ok(())
    }

    /// Memory is not short for as long as it takes to leave the ladder's rungs.
    pub(crate) fn relax(&mut self) -> Checked {
        if self.is_pressed {
            self.report(Pressure::None, i64::MAX);
            self.pass(80 * 25)?;
        }
        self.is_pressed = false;
        Ok(())
    }

    fn report(&mut self, pressure: Pressure, headroom_bytes: i64) {
        self.n_looks += 1;
        self.machine.look(Outlook { number: self.n_looks, pressure, headroom_bytes }, self.now);
    }
}
