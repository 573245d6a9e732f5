//! Volumes of a pod.

use serde_json::Value;

use super::faults::Faults;
use crate::resource::names;
use crate::resource::object::{int_at, items_at, str_at};
use crate::resource::path::Path;
use crate::resource::quantity::Quantity;

/// Sources that a node can provide.
const SOURCES: [&str; 6] = ["configMap", "downwardAPI", "emptyDir", "hostPath", "projected", "secret"];
const HOST_PATH_TYPES: [&str; 7] =
    ["BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
/// Highest file mode: 0777.
const MODE_MAX: i64 = 0o777;

/// Checks the volumes and returns their names.
pub(super) fn volumes<'v>(spec: &'v Value, path: &Path<'_>, faults: &mut Faults) -> Vec<&'v str> {
    let mut seen = Vec::new();
    super::each(spec, "volumes", path, faults, |volume, path, faults| {
        let name = str_at(volume, &["name"]);
        let name_path = path.key("name");
        if name.is_empty() {
            faults.required(&name_path, "");
        } else if seen.contains(&name) {
            faults.duplicate(&name_path, format_args!("{name:?}"));
        } else {
            faults.check(&name_path, name, names::dns1123_label(name));
        }
        seen.push(name);
        source(volume, path, faults);
    });
    seen
}

fn source(volume: &Value, path: &Path<'_>, faults: &mut Faults) {
    let mut found: Option<&str> = None;
    for (key, content) in volume.as_object().into_iter().flatten().filter(|(k, _)| *k != "name") {
        let path = path.key(key);
        if found.is_some() {
            faults.forbidden(&path, "may not specify more than 1 volume type");
            continue;
        }
        found = Some(key);
        match key.as_str() {
            "hostPath" => host_path(content, &path, faults),
            "emptyDir" => empty_dir(content, &path, faults),
            "configMap" => {
                require(content, "name", &path, faults);
                files(content, &path, faults);
            }
            "secret" => {
                require(content, "secretName", &path, faults);
                files(content, &path, faults);
            }
            "downwardAPI" => {
                faults.range(&path.key("defaultMode"), int_at(content, &["defaultMode"]), 0, MODE_MAX);
                downward_items(content, &path, faults);
            }
            "projected" => projected(content, &path, faults),
            other => {
                let list = SOURCES.join(", ");
                faults.forbidden(
                    &path,
                    format_args!("volumes of type {other} are not supported; use one of {list}"),
                );
            }
        }
    }
    if found.is_none() {
        faults.required(path, "must specify a volume type");
    }
}

fn require(content: &Value, key: &'static str, path: &Path<'_>, faults: &mut Faults) {
    if str_at(content, &[key]).is_empty() {
        faults.required(&path.key(key), "");
    }
}

/// A path that stays inside the volume.
pub(super) fn inside(text: &str, path: &Path<'_>, faults: &mut Faults) {
    if text.starts_with('/') {
        faults.invalid_text(path, text, "must be a relative path");
    } else if text.split('/').any(|part| part == "..") {
        faults.invalid_text(path, text, "must not contain '..'");
    }
}

fn host_path(content: &Value, path: &Path<'_>, faults: &mut Faults) {
    let host = str_at(content, &["path"]);
    let field = path.key("path");
    if host.is_empty() {
        faults.required(&field, "");
    } else if host.split('/').any(|part| part == "..") {
        faults.invalid_text(&field, host, "must not contain '..'");
    } else if !host.starts_with('/') {
        faults.invalid_text(&field, host, "must be an absolute path");
    }
    faults.one_of(&path.key("type"), str_at(content, &["type"]), &HOST_PATH_TYPES);
}

fn empty_dir(content: &Value, path: &Path<'_>, faults: &mut Faults) {
    faults.one_of(&path.key("medium"), str_at(content, &["medium"]), &["Memory"]);
    if let Some(Ok(limit)) = content.get("sizeLimit").map(Quantity::from_json)
        && limit.is_negative()
    {
        faults.invalid(&path.key("sizeLimit"), limit, "must be greater than or equal to 0");
    }
}

fn files(content: &Value, path: &Path<'_>, faults: &mut Faults) {
    faults.range(&path.key("defaultMode"), int_at(content, &["defaultMode"]), 0, MODE_MAX);
    super::each(content, "items", path, faults, |item, path, faults| {
        require(item, "key", path, faults);
        require(item, "path", path, faults);
        inside(str_at(item, &["path"]), &path.key("path"), faults);
        faults.range(&path.key("mode"), int_at(item, &["mode"]), 0, MODE_MAX);
    });
}

fn downward_items(content: &Value, path: &Path<'_>, faults: &mut Faults) {
    super::each(content, "items", path, faults, |item, path, faults| {
        require(item, "path", path, faults);
        inside(str_at(item, &["path"]), &path.key("path"), faults);
        match (item.get("fieldRef"), item.get("resourceFieldRef")) {
            (Some(field), None) => require(field, "fieldPath", &path.key("fieldRef"), faults),
            (None, Some(field)) => require(field, "resource", &path.key("resourceFieldRef"), faults),
            (Some(_), Some(_)) => {
                faults.forbidden(path, "fieldRef and resourceFieldRef can not be specified simultaneously");
            }
            (None, None) => faults.required(path, "one of fieldRef and resourceFieldRef is required"),
        }
    });
}

fn projected(content: &Value, path: &Path<'_>, faults: &mut Faults) {
    faults.range(&path.key("defaultMode"), int_at(content, &["defaultMode"]), 0, MODE_MAX);
    if items_at(content, &["sources"]).is_empty() {
        faults.required(&path.key("sources"), "");
    }
    super::each(content, "sources", path, faults, |source, path, faults| {
        let keys: Vec<&String> = source.as_object().into_iter().flat_map(serde_json::Map::keys).collect();
        let [key] = keys.as_slice() else {
            return faults.required(path, "exactly one source is required");
        };
        let path = path.key(key);
        let inner = &source[key.as_str()];
        match key.as_str() {
            "configMap" | "secret" => {
                require(inner, "name", &path, faults);
                files(inner, &path, faults);
            }
            "downwardAPI" => downward_items(inner, &path, faults),
            other => faults.forbidden(
                &path,
                format_args!("projected sources of type {other} are not supported; use configMap, secret or downwardAPI"),
            ),
        }
    });
}
