//! Is the Chinese README in step? The same headings by level, the same commands, the same links. And do the installed
//! pages point to what is installed?

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

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

/// The pages that tell people what to type and to write.
fn pages() -> Vec<PathBuf> {
    let root = sparsed_tests::root();
    let folders = ["packaging", "packaging/tutorials", "packaging/man"].map(|folder| root.join(folder));
    let entries = folders.iter().flat_map(|folder| folder.read_dir().unwrap()).map(|entry| entry.unwrap().path());
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md" || extension == "in");
    let mut pages: Vec<PathBuf> = entries.filter(is_page).collect();
    pages.extend([root.join("README.md"), root.join("README.zh-CN.md")]);
    pages
}

/// What `sparsectl` says; `None` where it fails.
fn tool(arguments: &[&str]) -> Option<String> {
    let done = Command::new(sparsed_tests::sparsectl()).args(arguments).output().unwrap();
    done.status.success().then(|| String::from_utf8(done.stdout).unwrap())
}

#[test]
fn the_settings_that_a_page_shows_are_settings() {
    let dir = tempfile::tempdir().unwrap();
    let mut n_blocks = 0;
    for path in pages() {
        let text = std::fs::read_to_string(&path).unwrap();
        for block in text.split("```").skip(1).step_by(2) {
            // A block of settings says so, or begins with a table.
            let (language, settings) = block.split_once('\n').unwrap();
            if language != "toml" && !(language.is_empty() && settings.starts_with('[')) {
                continue;
            }
            let file = dir.path().join("config.toml");
            std::fs::write(&file, settings).unwrap();
            let shown = tool(&["config", "show", "--config", file.to_str().unwrap()]);
            assert!(shown.is_some(), "{}: {settings}", path.display());
            n_blocks += 1;
        }
    }
    assert!(n_blocks > 4, "{n_blocks} blocks");
}

/// The words of each command `sparsectl ...` in a page, up to what the shell or the text has behind it.
fn commands_of_the_tool(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\\n", " ").replace("\\-", "-");
    let lines = text.lines().flat_map(|line| line.split("sparsectl ").skip(1).collect::<Vec<_>>());
    let words = |rest: &str| {
        let mut words = Vec::new();
        for word in rest.split_whitespace() {
            let end = word.find(['`', '|', ';', '&', '<', '>', '#', ')', ',']).unwrap_or(word.len());
            words.extend((end > 0).then(|| word[..end].trim_matches(['"', '\'']).to_owned()));
            if end < word.len() {
                break;
            }
        }
        words
    };
    lines.map(words).filter(|words: &Vec<String>| !words.is_empty()).collect()
}

#[test]
fn the_options_that_a_page_names_are_options_of_that_command() {
    let mut helps: BTreeMap<Vec<String>, Option<String>> = BTreeMap::new();
    let mut help = |command: &[String]| -> Option<String> {
        let arguments: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
        helps.entry(command.to_vec()).or_insert_with(|| tool(&arguments)).clone()
    };
    let mut n_options = 0;
    for path in pages() {
        let text = std::fs::read_to_string(&path).unwrap();
        for words in commands_of_the_tool(&text) {
            let options: Vec<&String> = words.iter().filter(|word| word.starts_with("--") && word.len() > 2).collect();
            if options.is_empty() {
                continue;
            }
            // Of two words the second may be an argument, of one it must be a command.
            let is_word =
                |word: &&String| word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-');
            let command: Vec<String> = words.iter().take(2).take_while(is_word).cloned().collect();
            let known = help(&command).or_else(|| help(&command[..command.len().min(1)]));
            let known = known.unwrap_or_else(|| panic!("{}: sparsectl {}", path.display(), words.join(" ")));
            for option in options {
                let name = option.split('=').next().unwrap();
                let is_there = known.split(|c: char| c.is_whitespace() || ",=[]".contains(c)).any(|word| word == name);
                assert!(is_there, "{}: {name} in: sparsectl {}", path.display(), words.join(" "));
                n_options += 1;
            }
        }
    }
    assert!(n_options > 20, "{n_options} options");
}
