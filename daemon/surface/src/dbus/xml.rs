//! How do tools see an object? Introspection data, made of the tables; the same text is installed as files.

use super::interface::{Argument, Changes, Interface};
use std::fmt::Write;

const HEAD: &str = "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \
                    \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n<node>\n";
/// Columns of a comment.
const WIDTH: usize = 110;

/// A node with its interfaces and the names of nodes below it.
pub(super) fn node(interfaces: &[&Interface], children: &[String]) -> String {
    let mut xml = HEAD.to_owned();
    for interface in interfaces {
        write_interface(&mut xml, interface);
    }
    for child in children {
        line(&mut xml, 2, &format!("<node name=\"{child}\"/>"));
    }
    xml + "</node>\n"
}

fn write_interface(xml: &mut String, interface: &Interface) {
    line(xml, 2, &format!("<interface name=\"{}\">", interface.name));
    for method in interface.methods {
        comment(xml, method.doc);
        line(xml, 4, &format!("<method name=\"{}\">", method.name));
        arguments(xml, method.takes, Some("in"));
        arguments(xml, method.gives, Some("out"));
        line(xml, 4, "</method>");
    }
    for signal in interface.signals {
        comment(xml, signal.doc);
        line(xml, 4, &format!("<signal name=\"{}\">", signal.name));
        arguments(xml, signal.carries, None);
        line(xml, 4, "</signal>");
    }
    for property in interface.properties {
        comment(xml, property.doc);
        line(xml, 4, &format!("<property name=\"{}\" type=\"{}\" access=\"read\">", property.name, property.kind));
        let value = match property.changes {
            Changes::Announced => "true",
            Changes::Noted => "invalidates",
            Changes::Constant => "const",
            Changes::Never => "false",
        };
        let name = "org.freedesktop.DBus.Property.EmitsChangedSignal";
        line(xml, 6, &format!("<annotation name=\"{name}\" value=\"{value}\"/>"));
        line(xml, 4, "</property>");
    }
    line(xml, 2, "</interface>");
}

fn arguments(xml: &mut String, arguments: &[Argument], direction: Option<&str>) {
    for (name, kind) in arguments {
        let direction = direction.map_or_else(String::new, |way| format!(" direction=\"{way}\""));
        line(xml, 6, &format!("<arg name=\"{name}\" type=\"{kind}\"{direction}/>"));
    }
}

/// Words in lines; quotes and angle brackets may stand in a comment, two hyphens may not, and none of ours has them.
fn comment(xml: &mut String, text: &str) {
    let mut row = String::new();
    for word in text.split_whitespace() {
        if row.len() + word.len() > WIDTH {
            line(xml, 4, &format!("<!-- {row} -->"));
            row.clear();
        }
        if !row.is_empty() {
            row.push(' ');
        }
        row += word;
    }
    if !row.is_empty() {
        line(xml, 4, &format!("<!-- {row} -->"));
    }
}

fn line(xml: &mut String, indent: usize, text: &str) {
    writeln!(xml, "{:indent$}{text}", "").expect("a String takes all");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dbus::interface::{MANAGER, REQUEST, SESSION};
    use std::path::Path;

    /// A change of the interface is a change of these files: read the diff, then run the test with BLESS=1.
    #[test]
    fn the_installed_files_are_what_objects_say_of_themselves() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/dbus/interfaces");
        for interface in [&MANAGER, &SESSION, &REQUEST] {
            let (path, xml) = (folder.join(format!("{}.xml", interface.name)), node(&[interface], &[]));
            if std::env::var_os("BLESS").is_some() {
                std::fs::write(&path, &xml).unwrap();
            }
            let installed = std::fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(installed, xml, "{} is another interface; BLESS=1 writes it", path.display());
        }
    }

    #[test]
    fn comments_are_lines_without_two_hyphens() {
        for interface in [&MANAGER, &SESSION, &REQUEST] {
            let xml = node(&[interface], &[]);
            let comments = xml.lines().filter_map(|line| line.trim().strip_prefix("<!-- "));
            let texts: Vec<&str> = comments.map(|text| text.strip_suffix(" -->").unwrap()).collect();
            assert!(!texts.is_empty() && texts.iter().all(|text| !text.contains("--") && text.len() <= WIDTH + 1));
        }
    }
}
