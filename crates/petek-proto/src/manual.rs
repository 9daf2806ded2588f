//! Tests of the manual itself: what the descriptors say of every message, field and value.

use std::collections::{BTreeSet, HashMap};

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

use crate::FILE_DESCRIPTOR_SET;

fn descriptors() -> FileDescriptorSet {
    FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("the build wrote a descriptor set")
}

/// Anything that has a comment: its full name, the comment on one line, the field if it is one.
struct Entry {
    name: String,
    comment: String,
    field: Option<FieldDescriptorProto>,
}

/// Walks petek's own files: every service, rpc, message, field, oneof, enum and value.
fn entries() -> Vec<Entry> {
    let mut entries = Vec::new();
    for file in descriptors().file.iter().filter(|file| file.package().starts_with("petek.")) {
        let info = file.source_code_info.as_ref().expect("compiled with source info");
        let comments: HashMap<&[i32], &str> =
            info.location.iter().map(|location| (&location.path[..], location.leading_comments())).collect();
        let mut walk = Walk { comments, entries: &mut entries };
        // The numbers of a path are those of the fields of FileDescriptorProto and its parts.
        for (i, message) in file.message_type.iter().enumerate() {
            walk.message(&[4, i as i32], file.package(), message);
        }
        for (i, item) in file.enum_type.iter().enumerate() {
            walk.enumeration(&[5, i as i32], file.package(), item);
        }
        for (i, service) in file.service.iter().enumerate() {
            let name = format!("{}.{}", file.package(), service.name());
            for (j, method) in service.method.iter().enumerate() {
                walk.push(&[6, i as i32, 2, j as i32], format!("{name}/{}", method.name()), None);
            }
            walk.push(&[6, i as i32], name, None);
        }
    }
    entries
}

struct Walk<'a> {
    comments: HashMap<&'a [i32], &'a str>,
    entries: &'a mut Vec<Entry>,
}

impl Walk<'_> {
    fn push(&mut self, path: &[i32], name: String, field: Option<FieldDescriptorProto>) {
        let comment = self.comments.get(path).copied().unwrap_or_default();
        let comment = comment.split_whitespace().collect::<Vec<_>>().join(" ");
        self.entries.push(Entry { name, comment, field });
    }

    fn message(&mut self, path: &[i32], scope: &str, message: &DescriptorProto) {
        // A map's entries are written by the compiler.
        if message.options.as_ref().is_some_and(|options| options.map_entry()) {
            return;
        }
        let name = format!("{scope}.{}", message.name());
        for (i, field) in message.field.iter().enumerate() {
            self.push(&join(path, 2, i), format!("{name}.{}", field.name()), Some(field.clone()));
        }
        // So are the oneofs behind `optional`, which come after all others.
        let optionals = message.field.iter().filter(|field| field.proto3_optional()).count();
        for (i, oneof) in message.oneof_decl[..message.oneof_decl.len() - optionals].iter().enumerate() {
            self.push(&join(path, 8, i), format!("{name}.{}", oneof.name()), None);
        }
        for (i, nested) in message.nested_type.iter().enumerate() {
            self.message(&join(path, 3, i), &name, nested);
        }
        for (i, item) in message.enum_type.iter().enumerate() {
            self.enumeration(&join(path, 4, i), &name, item);
        }
        self.push(path, name, None);
    }

    fn enumeration(&mut self, path: &[i32], scope: &str, item: &EnumDescriptorProto) {
        for (i, value) in item.value.iter().enumerate() {
            self.push(&join(path, 2, i), format!("{scope}.{}", value.name()), None);
        }
        self.push(path, format!("{scope}.{}", item.name()), None);
    }
}

fn join(path: &[i32], field: i32, index: usize) -> Vec<i32> {
    [path, &[field, index as i32]].concat()
}

#[test]
fn every_service_and_method_stands_in_the_descriptor_set() {
    let set = descriptors();
    let methods: BTreeSet<String> = (set.file.iter())
        .flat_map(|file| file.service.iter().map(move |service| (file.package(), service)))
        .flat_map(|(package, service)| {
            (service.method.iter())
                .map(move |method| format!("{package}.{}/{}", service.name(), method.name()))
        })
        .collect();
    let expected = [
        (
            "petek.inference.v1.InferenceService",
            "Generate StreamGenerate Chat StreamChat Tokenize Detokenize ListModels GetModel",
        ),
        ("petek.admin.v1.AdminService", "ListWorkers WatchWorkers DrainWorker ExplainRoute"),
        ("petek.worker.v1.WorkerService", "Execute GetStatus WatchLoad WatchKvEvents GetModelCard Drain"),
    ];
    let expected: BTreeSet<String> = (expected.iter())
        .flat_map(|(service, methods)| methods.split(' ').map(move |method| format!("{service}/{method}")))
        .collect();
    assert_eq!(methods, expected);
    // Reflection resolves imports from the set alone.
    let files: BTreeSet<&str> = set.file.iter().map(|file| file.name()).collect();
    let missing =
        set.file.iter().flat_map(|file| &file.dependency).find(|name| !files.contains(name.as_str()));
    assert_eq!(missing, None);
}

#[test]
fn everything_has_a_comment() {
    let entries = entries();
    assert!(entries.len() > 300, "the walk saw only {} entries", entries.len());
    let bare: Vec<&str> =
        entries.iter().filter(|entry| entry.comment.is_empty()).map(|entry| &entry.name[..]).collect();
    assert!(bare.is_empty(), "no comment: {bare:#?}");
}

#[test]
fn a_default_that_is_not_zero_makes_a_field_optional() {
    let mut seen = 0;
    let mut wrong = Vec::new();
    for Entry { name, comment, field } in entries() {
        let Some(field) = field else { continue };
        let default =
            comment.split_once("Default: ").map(|(_, rest)| rest.split(['.', ';', ',']).next().unwrap());
        seen += usize::from(default.is_some());
        let zero = matches!(default, None | Some("0" | "false" | "empty"));
        let scalar = field.r#type() != Type::Message && field.label() != Label::Repeated;
        let can_be_left_out = scalar && field.proto3_optional();
        if !zero && !can_be_left_out {
            wrong.push(format!("{name} has the default {default:?} and cannot be left out"));
        }
        // The other way round: what can be left out says what then holds.
        if field.proto3_optional() && default.is_none() && !comment.contains("nset") {
            wrong.push(format!("{name} is optional and says not what leaving it out means"));
        }
    }
    assert!(seen > 40, "only {seen} defaults are documented");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Units stand last in a name, so that a reader of the JSON needs no manual.
#[test]
fn a_field_that_is_a_time_says_its_unit() {
    for Entry { name, field, .. } in entries() {
        let Some(field) = field else { continue };
        let last = field.name().rsplit('_').next().unwrap_or_default();
        let bare =
            matches!(last, "deadline" | "time" | "age" | "wait" | "ttft" | "cost" | "duration" | "timeout");
        assert!(!bare, "{name} has no unit");
        if field.r#type() == Type::Double && name != "petek.inference.v1.TemplateValue.float_value" {
            assert!(matches!(last, "ms" | "s" | "share"), "{name} has no unit");
        }
    }
}

/// docs/reference/wire.md lists the reasons; a row that is missing or wrong is a promise broken.
#[test]
fn the_page_lists_every_reason_as_it_is() {
    let page = include_str!("../../../docs/reference/wire.md");
    let (_, table) = page.split_once("| reason |").expect("the table of reasons");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let rows: Vec<Vec<&str>> =
        rows.map(|row| row.split('|').map(str::trim).skip(1).take(3).collect()).collect();
    let expected: Vec<[String; 3]> = (petek_core::refusal::Reason::ALL.iter())
        .map(|reason| {
            // core's own names of gRPC's codes, as gRPC spells them.
            let code =
                format!("{:?}", reason.code()).chars().enumerate().fold(String::new(), |mut name, (i, c)| {
                    if i > 0 && c.is_uppercase() {
                        name.push('_');
                    }
                    name.extend(c.to_uppercase());
                    name
                });
            [reason.as_str().to_owned(), code, reason.http_status().to_string()]
        })
        .collect();
    assert_eq!(rows, expected);
}
