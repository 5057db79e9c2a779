//! Which experts does a token go to?

use super::elementwise::exp;
use crate::simd::Portable;

/// The attributes of MOE_ROUTE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Routing {
    pub(crate) groups: usize,
    pub(crate) groups_kept: usize,
    pub(crate) softmax: bool,
    pub(crate) renormalise: bool,
    pub(crate) group_by_best: bool,
    pub(crate) scale: f32,
}

/// Chooses `ids.len()` experts for one token (OPS.md, MOE_ROUTE). An empty bias is 0.
pub(crate) fn route(r: Routing, logits: &[f32], bias: &[f32], ids: &mut [i32], weights: &mut [f32]) {
    let mut p: Vec<f32> = if r.softmax {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        logits.iter().map(|x| exp::<Portable>(x - largest)).collect()
    } else {
        logits.iter().map(|x| 1.0 / (1.0 + exp::<Portable>(-x))).collect()
    };
    if r.softmax {
        let sum: f32 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
    }
    let mut b: Vec<f32> = p.iter().enumerate().map(|(e, p)| p + bias.get(e).copied().unwrap_or(0.0)).collect();
    if r.groups > 1 {
        drop_groups(r, &mut b);
    }
    let mut chosen: Vec<usize> = (0..b.len()).collect();
    chosen.sort_by(|x, y| b[*y].total_cmp(&b[*x]));
    let sum: f32 = chosen[..ids.len()].iter().map(|&e| p[e]).sum();
    for ((id, weight), &e) in ids.iter_mut().zip(weights).zip(&chosen) {
        *id = i32::try_from(e).expect("far fewer than 2^31 experts");
        *weight = if r.renormalise { p[e] / (sum + 1e-20) } else { p[e] } * r.scale;
    }
}

/// Puts the experts of all but the best groups out of reach.
fn drop_groups(r: Routing, b: &mut [f32]) {
    let size = b.len() / r.groups;
    let score = |group: &[f32]| {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &v in group {
            if v > first {
                (first, second) = (v, first);
            } else if v > second {
                second = v;
            }
        }
        if r.group_by_best || size == 1 { first } else { first + second }
    };
    let scores: Vec<f32> = b.chunks_exact(size).map(score).collect();
    let mut order: Vec<usize> = (0..r.groups).collect();
    order.sort_by(|x, y| scores[*y].total_cmp(&scores[*x]));
    for &group in &order[r.groups_kept..] {
        b[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Routing =
        Routing { groups: 1, groups_kept: 1, softmax: true, renormalise: false, group_by_best: false, scale: 1.0 };

    #[test]
    fn the_bias_selects_but_does_not_weigh() {
        let (mut ids, mut weights) = ([0; 1], [0.0; 1]);
        route(PLAIN, &[0.0, 0.0], &[0.0, 1.0], &mut ids, &mut weights);
        assert_eq!(ids, [1]);
        assert!((weights[0] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn only_the_best_groups_are_reached() {
        let grouped = Routing { groups: 2, softmax: false, renormalise: true, scale: 2.0, ..PLAIN };
        let (mut ids, mut weights) = ([0; 2], [0.0; 2]);
        route(grouped, &[5.0, -9.0, 1.0, 1.0], &[], &mut ids, &mut weights);
        assert_eq!(ids, [2, 3], "the pair of good ones beats the single best");
        assert!((weights[0] - 1.0).abs() < 1e-6 && (weights[1] - 1.0).abs() < 1e-6);
    }
}
