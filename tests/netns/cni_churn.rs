//! Attachments that come and go, many at once, leave nothing: the short form of `cargo xtask soak cni`.

use sheave_harness::{require_root, wait_for};

use crate::cni_bed::{Bed, Plugin, our_binary};

#[test]
fn attachments_that_come_and_go_leave_nothing() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(Plugin::Ours);
    let (plugin, before) = (our_binary(), bed.at_rest());
    let mut descriptors = None;
    for round in 0..2 {
        bed.churn(&plugin, 60, 12).unwrap_or_else(|why| panic!("round {round}: {why}"));
        wait_for("nothing to be left", || {
            let left: Vec<String> = bed.traces().symmetric_difference(&before).cloned().collect();
            if left.is_empty() { Ok(()) } else { Err(format!("round {round}: {left:#?}")) }
        });
        let first = *descriptors.get_or_insert(bed.descriptors());
        wait_for("descriptors to be closed", || match bed.descriptors() {
            now if now <= first => Ok(()),
            now => Err(format!("round {round}: {now} are open, {first} were after the first")),
        });
    }
}
