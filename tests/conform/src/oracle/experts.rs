//! MOE_ROUTE for one token.

/// The attributes of MOE_ROUTE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Routing {
    pub(crate) active: usize,
    pub(crate) groups: usize,
    pub(crate) groups_kept: usize,
    pub(crate) softmax: bool,
    pub(crate) renormalise: bool,
    pub(crate) group_by_best: bool,
}

/// `p`: sigmoid or softmax of the logits.
pub(crate) fn chances(routing: &Routing, logits: &[f64]) -> Vec<f64> {
    if !routing.softmax {
        return logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    }
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|x| x / sum).collect()
}

/// The experts with the greatest `b` in the groups that are kept, best first; the lower id first of equals.
pub(crate) fn best_experts(routing: &Routing, b: &[f64]) -> Vec<usize> {
    let size = b.len() / routing.groups;
    let group_score = |group: usize| {
        let mut own = b[group * size..(group + 1) * size].to_vec();
        own.sort_by(|x, y| y.total_cmp(x));
        if routing.group_by_best { own[0] } else { own.iter().take(2).sum() }
    };
    let scores: Vec<f64> = (0..routing.groups).map(group_score).collect();
    let kept = descending(&scores, 0..routing.groups, routing.groups_kept);
    let reachable = (0..b.len()).filter(|expert| kept.contains(&(expert / size)));
    descending(b, reachable, routing.active)
}

/// The best `n` of `candidates` by value, the lower number first of equals.
fn descending(values: &[f64], candidates: impl Iterator<Item = usize>, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = candidates.collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(n);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_kept_by_their_best_two_or_their_best() {
        let by_two =
            Routing { active: 2, groups: 2, groups_kept: 1, softmax: false, renormalise: false, group_by_best: false };
        let b = [0.9, 0.1, 0.6, 0.6];
        assert_eq!(best_experts(&by_two, &b), [2, 3]);
        assert_eq!(best_experts(&Routing { group_by_best: true, ..by_two }, &b), [0, 1]);
    }

    #[test]
    fn softmax_adds_up_to_one() {
        let routing =
            Routing { active: 1, groups: 1, groups_kept: 1, softmax: true, renormalise: false, group_by_best: false };
        assert!((chances(&routing, &[1.0, 2.0, 3.0]).iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
