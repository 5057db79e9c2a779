//! Which stretches of text are read? Windows of one length, from as many documents as there are.

/// Cuts `documents` into at most `count` windows of `length` tokens, each beginning with `prefix` (the begin token, or
/// nothing).
///
/// Each document in turn gives its next whole window, so that few windows still come from many documents; what is left
/// of documents, and short ones, are then joined in order and cut likewise.
///
/// # Panics
/// When a window has no room after the prefix.
pub fn windows(documents: &[Vec<u32>], prefix: &[u32], length: usize, count: usize) -> Vec<Vec<u32>> {
    assert!(length > prefix.len(), "{length} tokens with a prefix of {}", prefix.len());
    let body = length - prefix.len();
    let framed = |tokens: &[u32]| [prefix, tokens].concat();
    let mut cut = Vec::new();
    let most = documents.iter().map(|document| document.len() / body).max().unwrap_or(0);
    for turn in 0..most {
        let nth = documents.iter().filter_map(|document| document.get(turn * body..(turn + 1) * body));
        cut.extend(nth.map(framed).take(count - cut.len()));
        if cut.len() == count {
            return cut;
        }
    }
    let rests = documents.iter().flat_map(|document| &document[document.len() / body * body..]);
    let rests: Vec<u32> = rests.copied().collect();
    cut.extend(rests.chunks_exact(body).map(framed).take(count - cut.len()));
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<Vec<u32>> {
        vec![(0..7).collect(), (10..12).collect(), (20..26).collect()]
    }

    #[test]
    fn documents_take_turns_and_their_rests_are_joined() {
        let cut = windows(&documents(), &[], 3, 100);
        let expected: [&[u32]; 5] = [&[0, 1, 2], &[20, 21, 22], &[3, 4, 5], &[23, 24, 25], &[6, 10, 11]];
        assert_eq!(cut, expected);
    }

    #[test]
    fn no_more_windows_than_wanted_and_each_begins_with_the_prefix() {
        assert_eq!(windows(&documents(), &[99], 4, 2), [[99, 0, 1, 2], [99, 20, 21, 22]]);
        assert_eq!(windows(&documents(), &[], 3, 5).len(), 5);
        assert_eq!(windows(&documents(), &[], 3, 1).len(), 1);
    }

    #[test]
    fn short_texts_make_windows_together_and_too_little_text_makes_none() {
        let lines: Vec<Vec<u32>> = (0..10).map(|n| vec![n, n]).collect();
        assert_eq!(windows(&lines, &[], 15, 9), [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]]);
        assert!(windows(&lines, &[], 21, 9).is_empty());
        assert!(windows(&[], &[], 5, 9).is_empty());
    }
}
