//! Is the Chinese README in step? The same headings by level, the same commands, the same links. And do the installed
//! pages point to what is installed?

use std::collections::BTreeSet;

fn page(name: &str) -> String {
    std::fs::read_to_string(sparsed_tests::root().join(name)).unwrap()
}

/// The depth of each heading outside blocks of code, in order.
fn headings(page: &str) -> Vec<usize> {
    let outside = page.split("```").step_by(2);
    let lines = outside.flat_map(str::lines).filter(|line| line.starts_with('#'));
    lines.map(|line| line.chars().take_while(|&c| c == '#').count()).collect()
}

/// Blocks of code without the remarks behind their lines, which are translated.
fn commands(page: &str) -> Vec<String> {
    let block = |text: &str| {
        let lines = text.lines().map(|line| line.split("    #").next().unwrap_or_default().trim_end());
        lines.collect::<Vec<_>>().join("\n")
    };
    page.split("```").skip(1).step_by(2).map(block).collect()
}

/// Commands within the text.
fn inline(page: &str) -> BTreeSet<String> {
    let outside: String = page.split("```").step_by(2).collect();
    let spans = outside
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|span| span.starts_with("sparsectl ") || span.starts_with("make "));
    spans.map(str::to_owned).collect()
}

#[test]
fn the_chinese_readme_has_the_headings_and_commands_of_the_english_one() {
    let (english, chinese) = (page("README.md"), page("README.zh-CN.md"));
    assert_eq!(headings(&chinese), headings(&english));
    let (commands, expected) = (commands(&chinese), commands(&english));
    assert!(expected.len() >= 3);
    for (found, wanted) in commands.iter().zip(&expected) {
        assert_eq!(found, wanted);
    }
    assert_eq!(commands.len(), expected.len());
    let strangers: Vec<String> = inline(&chinese).difference(&inline(&english)).cloned().collect();
    assert!(strangers.is_empty(), "commands that the English README does not have: {strangers:?}");
}

#[test]
fn what_the_chinese_readme_points_to_is_there() {
    let chinese = page("README.zh-CN.md");
    let links = chinese.split("](").skip(1).map(|rest| rest.split(')').next().unwrap());
    let links: Vec<&str> = links.filter(|link| !link.starts_with("http")).collect();
    assert!(links.len() > 5);
    for link in links {
        assert!(sparsed_tests::root().join(link).exists(), "{link} is not there");
    }
}

/// Pages that the package puts into `/usr/share/doc/sparsed` as they lie in `packaging`, `tutorials` below it.
#[test]
fn what_an_installed_page_points_to_is_installed() {
    let root = sparsed_tests::root().join("packaging");
    let (assets, mut n_links) = (page("daemon/app/Cargo.toml"), 0);
    for folder in [root.clone(), root.join("tutorials")] {
        let names = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
        for path in names.filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
            let text = std::fs::read_to_string(&path).unwrap();
            for link in text.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap()) {
                if link.is_empty() || link.starts_with("http") {
                    continue;
                }
                let target = folder.join(link).canonicalize().unwrap_or_else(|_| panic!("{}: {link}", path.display()));
                let below = target.strip_prefix(&root).unwrap_or_else(|_| panic!("{}: {link}", path.display()));
                let asset = format!("\"../../packaging/{}\", \"usr/share/doc/sparsed/\"", below.display());
                let is_installed = below.extension().is_some_and(|e| e == "md") || assets.contains(&asset);
                assert!(is_installed, "{}: {link} is not installed", path.display());
                n_links += 1;
            }
        }
    }
    assert!(n_links > 5);
    // What is read on the box names no place of the sources.
    for name in
        ["packaging/config.toml", "systemd/catalog/sparsed.catalog", "packaging/mqtt.md", "packaging/upstream.md"]
    {
        let text = page(name);
        assert!(!text.contains("packaging/") && !text.contains(" systemd/"), "{name} names a place of the sources");
    }
}
