//! What do property tests of kernels put in, and what must two of them have alike?

use fastrand::Rng;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Values without end: most are spread evenly from -1 to 1, every eighth is one of a few that proptest has chosen.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    seed: u64,
    chosen: Vec<f32>,
}

impl Values {
    /// None of them chosen.
    pub(crate) fn seeded(seed: u64) -> Self {
        Self { seed, chosen: Vec::new() }
    }

    /// What gives as many of them as it is asked for, from the first on.
    pub(crate) fn rows(&self) -> impl FnMut(usize) -> Vec<f32> + use<> {
        let (mut random, chosen) = (Rng::with_seed(self.seed), self.chosen.clone());
        let mut value = move || match random.u8(..8) {
            0 if !chosen.is_empty() => chosen[random.usize(..chosen.len())],
            _ => 2.0 * random.f32() - 1.0,
        };
        move |n| (0..n).map(|_| value()).collect()
    }
}

/// Values of which the chosen ones are zeros, subnormal, small, or as large as `largest`, which is above 1.
pub(crate) fn values(largest: f32) -> impl Strategy<Value = Values> {
    let magnitude = prop_oneof![
        Just(0.0),
        (1u32..1 << 23).prop_map(f32::from_bits),
        (-120i32..0).prop_map(|power| 2f32.powi(power)),
        1.0..largest,
        Just(largest),
    ];
    let chosen = (magnitude, any::<bool>()).prop_map(|(v, negative)| if negative { -v } else { v });
    (any::<u64>(), vec(chosen, 0..6)).prop_map(|(seed, chosen)| Values { seed, chosen })
}

/// As many cases, always the same ones unless the environment has another seed (`PROPTEST_RNG_SEED`).
pub(crate) fn cases(n: u32) -> ProptestConfig {
    let mut config = ProptestConfig::with_cases(n);
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(1);
    }
    config
}

/// The bits, one NaN for all of them.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}
