//! What fails, and what takes its time?

use crate::daemon::World;
use crate::disk::Faults;

impl World {
    pub(crate) fn plan_faults(&mut self) {
        let slow_one_in = [0, 0, 0, 100][self.rng.usize(..4)];
        if self.is_calm {
            self.disk.set_faults(Faults { slow_one_in, ..Faults::NONE });
            return;
        }
        let off_after = (self.rng.u32(..3) == 0).then(|| self.rng.u64(..60));
        let one_in = [0, 0, 20, 100][self.rng.usize(..4)];
        let capacity_bytes = [usize::MAX, usize::MAX, 30_000][self.rng.usize(..3)];
        self.disk.set_faults(Faults { one_in, capacity_bytes, off_after, slow_one_in, ..Faults::NONE });
        if let Some(device) = &mut self.device {
            device.one_in = [0, 0, 15, 60][self.rng.usize(..4)];
            device.area.set_faults([0, 0, 3, 40][self.rng.usize(..4)]);
        }
    }

    pub(crate) fn forgive(&mut self) {
        self.disk.set_faults(Faults::NONE);
        self.busy_until = self.now;
        if let Some(device) = &mut self.device {
            device.one_in = 0;
            device.area.set_faults(0);
        }
    }
}
