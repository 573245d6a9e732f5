//! The conformance table: one named test a line of the checklist, run on `sheave-cni` and, where the reference plugins
//! have such a thing, on Debian's as well. Invariant: `docs/cni-conformance.md` is this table, and a line that says that
//! the reference differs has been seen to differ.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use sheave_harness::require_root;

use crate::cni_bed::{Bed, DEBIAN, Plugin};
use crate::{cni_attach as attach, cni_care as care, cni_extras as extras, cni_protocol as protocol};

/// What a case needs.
enum Body {
    /// The bed that all share.
    Shared(fn(&Bed)),
    /// One of its own, which it makes.
    Own(fn(Plugin)),
}
use Body::{Own, Shared};

/// What the reference plugins do with a case.
enum Reference {
    /// The same.
    Agrees,
    /// Something else, which makes the case fail on them.
    Differs(&'static str),
    /// Nothing that the case could be run on.
    Lacks(&'static str),
}
use Reference::{Agrees, Differs, Lacks};

struct Case {
    id: &'static str,
    says: &'static str,
    body: Body,
    reference: Reference,
}

const NO_1_1: &str = "speaks up to 1.0.0";
const NO_DAEMON: &str = "has no daemon";

/// One test and one line of the table for each entry.
macro_rules! cases {
    ($($test:ident $id:literal $says:literal $body:expr, $reference:expr;)*) => {
        const CASES: &[Case] =
            &[$(Case { id: $id, says: $says, body: $body, reference: $reference }),*];
        $(
            #[test]
            fn $test() {
                judge($id);
            }
        )*
    };
}

cases! {
    c01_exit_status "C01" "exits 0 on success, else not" Shared(protocol::exit_status), Agrees;
    c02_error_object "C02" "errors are objects on stdout with cniVersion, code, msg" Shared(protocol::error_object),
        Differs("no cniVersion in errors");
    c03_only_json_on_stdout "C03" "nothing but JSON on stdout" Shared(protocol::only_json_on_stdout), Agrees;
    c04_silent_verbs "C04" "DEL, CHECK, GC and STATUS print nothing on success" Shared(protocol::silent_verbs), Agrees;
    c05_missing_environment "C05" "missing variables: code 4, each named" Shared(protocol::missing_environment), Agrees;
    c06_about "C06" "without CNI_COMMAND: a word about itself on stderr, exit 0" Shared(protocol::about), Agrees;
    c07_unknown_command "C07" "unknown command: code 4" Shared(protocol::unknown_command), Agrees;
    c08_container_id_rules "C08" "bad container id: code 4" Shared(protocol::container_id_rules), Agrees;
    c09_ifname_rules "C09" "bad interface name: code 4" Shared(protocol::ifname_rules), Agrees;
    c10_network_name_rules "C10" "bad network name: code 7" Shared(protocol::network_name_rules), Agrees;
    c11_unreadable_configuration "C11" "no JSON: code 6, unreadable: code 5" Shared(protocol::unreadable_configuration),
        Agrees;
    c12_version_unsupported "C12" "unknown version: code 1" Shared(protocol::version_unsupported), Agrees;
    c13_check_needs_0_4 "C13" "CHECK below 0.4.0: code 1" Shared(protocol::check_needs_0_4), Agrees;
    c14_gc_and_status_need_1_1 "C14" "GC and STATUS below 1.1.0: code 1" Shared(protocol::gc_and_status_need_1_1),
        Lacks(NO_1_1);
    c15_result_versions "C15" "result in the version asked for, every advertised one"
        Shared(protocol::result_in_the_version_asked_for), Agrees;
    c16_version "C16" "VERSION needs neither stdin nor other variables" Shared(protocol::version_needs_nothing), Agrees;
    c17_unknown_keys "C17" "unknown keys are harmless" Shared(protocol::unknown_keys_are_harmless), Agrees;
    c18_refused_fields "C18" "code 2 names key and value" Shared(protocol::refused_fields_are_named), Differs("code 999");
    c19_own_namespace "C19" "its own namespace: code 8, before anything is done"
        Shared(protocol::own_namespace_is_refused), Differs("attaches its own namespace");
    c20_override "C20" "CNI_NETNS_OVERRIDE lifts that" Own(protocol::own_namespace_by_override), Agrees;
    c21_interface "C21" "makes the interface, or fails where it can't" Shared(attach::makes_the_interface), Agrees;
    c22_existing_interface "C22" "an existing interface of that name is an error, and stays"
        Shared(attach::existing_interface_is_an_error), Agrees;
    c23_interfaces "C23" "the result has every interface made, with its MAC and sandbox"
        Own(attach::interfaces_of_the_result), Agrees;
    c24_eth0 "C24" "eth0 is there and the addresses point at it" Shared(attach::eth0_with_addresses), Agrees;
    c25_prev_result "C25" "prevResult is amended or refused, never lost" Shared(attach::prev_result_is_kept), Differs("loses it");
    c26_prev_result_refused "C26" "a prevResult it can't chain is a clear error"
        Shared(attach::prev_result_it_cannot_chain), Differs("loses it in silence");
    c27_ipam_failure "C27" "a failed delegate is asked to delete" Shared(attach::failed_ipam_is_cleaned_up), Differs("does not ask it");
    c28_rollback "C28" "a failed ADD leaves nothing" Own(attach::failures_leave_nothing), Agrees;
    c29_at_once "C29" "concurrent ADDs" Shared(attach::at_once), Agrees;
    c30_add_twice "C30" "a second ADD is an error, the first attachment is undisturbed" Shared(attach::add_twice), Agrees;
    c31_true_result "C31" "routes, dns, mtu and mac are the kernel's" Shared(attach::result_is_true), Agrees;
    c32_del_twice "C32" "DEL again and again" Shared(attach::del_twice), Agrees;
    c33_del_without_namespace "C33" "DEL with the namespace gone releases all" Shared(attach::del_without_namespace), Differs("leaves the link on the node where the namespace is still held");
    c34_del_without_interface "C34" "DEL with the interface gone" Shared(attach::del_without_interface), Agrees;
    c35_del_without_prev_result "C35" "DEL with empty or absent prevResult" Shared(attach::del_without_prev_result), Agrees;
    c36_del_without_add "C36" "DEL without ADD" Shared(attach::del_without_add), Agrees;
    c37_del_after_failed_add "C37" "DEL after a failed ADD cleans up" Own(attach::del_after_failed_add), Agrees;
    c38_del_spares_heirs "C38" "DEL spares who has the address now" Shared(attach::del_spares_who_has_the_address_now),
        Agrees;
    c39_del_without_daemon "C39" "DEL with the daemon down succeeds and is done later"
        Own(attach::del_while_the_daemon_is_down), Lacks(NO_DAEMON);
    c40_rules_first "C40" "rules go before the interface" Own(attach::rules_go_before_the_interface), Agrees;
    c41_check_compares "C41" "CHECK reads prevResult" Shared(care::check_compares_with_prev_result), Agrees;
    c42_check_finds "C42" "CHECK finds what is missing" Shared(care::check_finds_what_is_missing), Agrees;
    c43_check_extras "C43" "CHECK finds missing port rules and shaping" Own(care::check_finds_missing_extras), Differs("CHECK of portmap fails on containers without IPv6");
    c44_check_tolerates "C44" "CHECK tolerates later plugins" Shared(care::check_tolerates_later_plugins), Agrees;
    c45_check_at_once "C45" "CHECK straight after ADD" Shared(care::check_straight_after_add), Agrees;
    c46_check_ipam "C46" "CHECK asks the delegate" Shared(care::check_asks_ipam), Agrees;
    c47_check_prev_result "C47" "CHECK without prevResult: code 7" Shared(care::check_needs_prev_result), Differs("code 999");
    c48_check_daemon "C48" "CHECK and ADD with the daemon down: code 11" Own(care::check_without_daemon),
        Lacks(NO_DAEMON);
    c49_status "C49" "STATUS is 0 where ADD works, else not" Own(care::status_says_whether_add_works), Lacks(NO_1_1);
    c50_status_50 "C50" "STATUS 50: daemon away or pool used up" Own(care::status_50), Lacks(NO_1_1);
    c51_status_51 "C51" "STATUS 51: the overlay is impaired" Own(care::status_51), Lacks(NO_1_1);
    c52_status_ipam "C52" "STATUS asks the delegate" Shared(care::status_asks_ipam), Lacks(NO_1_1);
    c53_status_gates_nothing "C53" "ADD and DEL work whatever STATUS said" Shared(care::add_whatever_status_said),
        Lacks(NO_1_1);
    c54_status_is_cheap "C54" "STATUS is quick and changes nothing" Own(care::status_changes_nothing), Lacks(NO_1_1);
    c55_gc_frees "C55" "GC frees what is not listed" Shared(care::gc_frees_what_is_not_listed), Lacks(NO_1_1);
    c56_gc_goes_on "C56" "GC goes on past errors and reports them" Shared(care::gc_goes_on_past_errors), Lacks(NO_1_1);
    c57_gc_ipam "C57" "GC asks the delegate" Shared(care::gc_asks_ipam), Lacks(NO_1_1);
    c58_gc_keys "C58" "GC takes both names of the list" Shared(care::gc_takes_both_keys), Lacks(NO_1_1);
    c59_gc_keeps "C59" "GC keeps all that is listed, across restarts" Own(care::gc_keeps_all_that_is_listed),
        Lacks(NO_1_1);
    c60_gc_other_networks "C60" "GC spares other networks" Shared(care::gc_spares_other_networks), Lacks(NO_1_1);
    c61_gc_absent_key "C61" "GC: no list is not an empty list" Shared(care::gc_without_the_key), Lacks(NO_1_1);
    c62_gc_twice "C62" "a second GC does nothing" Own(care::gc_twice), Lacks(NO_1_1);
    c63_port_mappings "C63" "portMappings: protocols, host addresses, port 0" Shared(extras::port_mappings), Differs("refuses host port 0");
    c64_stale_flows "C64" "stale UDP flows are flushed" Shared(extras::stale_udp_flows_are_flushed), Agrees;
    c65_bandwidth "C65" "bandwidth: configured wins, bursts of 2^32-1, no rate without burst"
        Shared(extras::bandwidth), Agrees;
    c66_requested_addresses "C66" "ips by three ways: honoured or an error" Shared(extras::requested_addresses), Agrees;
    c67_requested_mac "C67" "mac by three ways" Shared(extras::requested_mac), Differs("gives another in silence");
    c68_dns "C68" "configured dns replaces the delegate's" Shared(extras::dns_overrides_ipam), Agrees;
    c69_aliases "C69" "aliases change nothing" Shared(extras::aliases), Agrees;
    c70_masquerade "C70" "ipMasq" Shared(extras::masquerade), Agrees;
    c71_chain "C71" "before portmap, bandwidth, tuning, firewall and sbr" Shared(extras::chain), Agrees;
    c72_beside_loopback "C72" "beside loopback in the same namespace" Shared(extras::beside_loopback), Agrees;
    c73_delegate_search "C73" "CNI_PATH is searched for the delegate" Shared(extras::delegates_are_searched_for), Agrees;
    c74_delegate_input "C74" "delegates get the same environment and the whole configuration"
        Shared(extras::delegates_get_everything), Agrees;
    c75_delegate_stderr "C75" "delegates' stderr is passed on" Shared(extras::delegates_stderr), Agrees;
    c76_delegate_verbs "C76" "delegates are asked for every verb" Shared(extras::delegates_for_every_verb), Agrees;
    c77_two_networks "C77" "two networks in one namespace" Shared(extras::two_networks), Agrees;
    c78_replaced "C78" "the program is replaced under load" Shared(extras::replaced_under_load), Agrees;
    c79_signals "C79" "SIGTERM and SIGINT amid DEL" Shared(extras::signalled_while_deleting), Agrees;
    c80_dead_namespaces "C80" "dead namespaces are reclaimed without GC" Own(extras::dead_namespaces_are_reclaimed),
        Lacks("has nothing that runs between calls");
}

fn run(case: &Case, plugin: Plugin) {
    match case.body {
        Shared(body) => body(&Bed::shared(plugin)),
        Own(body) => body(plugin),
    }
}

fn judge(id: &str) {
    if !require_root() {
        return;
    }
    let case = CASES.iter().find(|case| case.id == id).expect("the case is in the table");
    let only = std::env::var("SHEAVE_CONFORMANCE_OF").unwrap_or_default();
    if only != "reference" {
        run(case, Plugin::Ours);
    }
    // Without Debian's plugins there is nobody to compare with; ours has been judged.
    if only == "ours" || !Path::new(DEBIAN).join("ptp").exists() {
        return;
    }
    match case.reference {
        Agrees => run(case, Plugin::Oracle),
        Differs(how) => {
            let outcome = catch_unwind(AssertUnwindSafe(|| run(case, Plugin::Oracle)));
            assert!(outcome.is_err(), "the reference no longer differs: {how}");
        }
        Lacks(_) => {}
    }
}

/// Where the table is kept, and the variable that asks for it to be written there.
const DOCUMENT: &str = "docs/cni-conformance.md";
const WRITE: &str = "SHEAVE_WRITE_CONFORMANCE";

const HEAD: &str = "\
# CNI conformance

`cargo xtask conformance` runs these cases and writes this page. Each executes the plugin as a runtime does, with an \
environment and standard input, and looks at its exit status, its output and the kernel; `sheave-cni` runs with an agent \
that has `--components network`, in namespaces of its own. Where the reference plugins have such a thing, the case runs \
on Debian's `containernetworking-plugins` 1.1.1 too (`ptp` with `host-local`, `portmap` and `bandwidth` after it); \
\"differs\" means that the case was seen to fail there.

";

fn document() -> String {
    let agrees = CASES.iter().filter(|case| matches!(case.reference, Agrees)).count();
    let differs = CASES.iter().filter(|case| matches!(case.reference, Differs(_))).count();
    let mut text = HEAD.to_owned();
    text.push_str(&format!(
        "Ours: {0} of {0} pass. The reference: {agrees} pass, {differs} differ, {1} have nothing to run on.\n\n",
        CASES.len(),
        CASES.len() - agrees - differs
    ));
    text.push_str("| case | what it asks | ours | reference | remark |\n|---|---|---|---|---|\n");
    for case in CASES {
        let (reference, remark) = match case.reference {
            Agrees => ("passes", ""),
            Differs(how) => ("differs", how),
            Lacks(what) => ("-", what),
        };
        text.push_str(&format!("| {} | {} | passes | {reference} | {remark} |\n", case.id, case.says));
    }
    text
}

#[test]
fn the_document_agrees() {
    let ids: Vec<&str> = CASES.iter().map(|case| case.id).collect();
    let wanted: Vec<String> = (1..=80).map(|n| format!("C{n:02}")).collect();
    assert_eq!(ids, wanted);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(DOCUMENT);
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, document()).expect("write the document");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == document(), "{DOCUMENT} is not what the table says: cargo xtask conformance");
}
