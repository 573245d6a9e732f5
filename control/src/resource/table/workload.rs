//! The columns of deployments and replica sets.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{AGE, NAME, Printer, age, name, number, text, wide};
use crate::resource::lifecycle::selector_text;
use crate::resource::object::{at, int_at, items_at, str_at};

pub(super) static DEPLOYMENT: Printer = Printer {
    columns: &[
        NAME,
        text("Ready", "Ready pods of those wanted."),
        number("Up-to-date", "Pods of the newest template."),
        number("Available", "Pods that have been ready long enough."),
        AGE,
        wide("Containers", "Containers of the template."),
        wide("Images", "Images of the template."),
        wide("Selector", "Label selector of the pods."),
    ],
    cells: |d, now| {
        let wanted = int_at(d, &["spec", "replicas"]).unwrap_or(0);
        let count = |key: &str| int_at(d, &["status", key]).unwrap_or(0);
        let mut cells = vec![
            name(d),
            json!(format!("{}/{wanted}", count("readyReplicas"))),
            json!(count("updatedReplicas")),
            json!(count("availableReplicas")),
            age::age(d, now),
        ];
        cells.extend(template(d));
        cells
    },
};

pub(super) static REPLICA_SET: Printer = Printer {
    columns: &[
        NAME,
        number("Desired", "Pods wanted."),
        number("Current", "Pods that exist."),
        number("Ready", "Pods that are ready."),
        AGE,
        wide("Containers", "Containers of the template."),
        wide("Images", "Images of the template."),
        wide("Selector", "Label selector of the pods."),
    ],
    cells: replica_set,
};

fn replica_set(rs: &Value, now: Timestamp) -> Vec<Value> {
    let mut cells = vec![
        name(rs),
        json!(int_at(rs, &["spec", "replicas"]).unwrap_or(0)),
        json!(int_at(rs, &["status", "replicas"]).unwrap_or(0)),
        json!(int_at(rs, &["status", "readyReplicas"]).unwrap_or(0)),
        age::age(rs, now),
    ];
    cells.extend(template(rs));
    cells
}

fn template(workload: &Value) -> [Value; 3] {
    let containers = items_at(workload, &["spec", "template", "spec", "containers"]);
    let joined = |key: &str| containers.iter().map(|c| str_at(c, &[key])).collect::<Vec<_>>().join(",");
    let selector = at(workload, &["spec", "selector"]).map(selector_text).unwrap_or_default();
    [json!(joined("name")), json!(joined("image")), super::string_or(&selector, "<none>")]
}
