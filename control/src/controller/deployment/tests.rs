//! Tables, one whole rollout as text, and the promises of a rolling update under random schedules.

use std::fmt::Write as _;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::rolling::{Bounds, Share, Size, new_size, proportional, shrink_old};
use crate::controller::action::Part;
use crate::controller::model::{IntOrString, ReplicaSet, RollingUpdate, condition};
use crate::controller::world::World;
use crate::resource::kinds::DEPLOYMENTS;

fn deployment(replicas: i64, strategy: Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "annotations": {"team": "a"}},
        "spec": {
            "replicas": replicas,
            "progressDeadlineSeconds": 600,
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": {"app": "web"}},
            "strategy": strategy,
            "template": {
                "metadata": {"labels": {"app": "web"}, "creationTimestamp": null},
                "spec": {"containers": [{"name": "c", "image": "echo:1"}]},
            },
        },
    })
}

fn rolling(surge: Value, unavailable: Value) -> Value {
    json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}})
}

fn world(replicas: i64, strategy: Value) -> World {
    let mut world = World::new();
    world.put(&DEPLOYMENTS, deployment(replicas, strategy));
    world
}

fn set_image(world: &mut World, image: &str) {
    let containers = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}});
    world.change(&DEPLOYMENTS, "web", Part::Main, &containers);
}

fn scale(world: &mut World, replicas: i64) {
    world.change(&DEPLOYMENTS, "web", Part::Main, &json!({"spec": {"replicas": replicas}}));
}

/// Runs everything to rest, making every pod ready as soon as it exists.
fn settle(world: &mut World) {
    for _ in 0..200 {
        let before = world.rev;
        world.step_deployment();
        world.settle_sets();
        let waiting: Vec<String> =
            world.pods().iter().filter(|p| !p.is_ready()).map(|p| p.metadata.name.clone()).collect();
        if world.rev == before && waiting.is_empty() {
            return;
        }
        for pod in waiting {
            world.set_ready(&pod, true);
        }
        world.settle_sets();
        world.pass(1);
    }
    panic!("the rollout does not come to rest: {:?}", world.deployment().status);
}

fn image_of(set: &ReplicaSet) -> String {
    set.spec.template["spec"]["containers"][0]["image"].as_str().unwrap_or("").to_owned()
}

fn sizes(world: &World) -> Vec<(String, i64)> {
    let mut sets: Vec<(String, i64)> = world.sets().iter().map(|s| (image_of(s), s.spec.replicas)).collect();
    sets.sort();
    sets
}

fn reason(world: &World, kind: &str) -> String {
    condition(&world.deployment().status.conditions, kind).map_or(String::new(), |c| c.reason.clone())
}

#[test]
fn bounds_round_as_upstream_does() {
    let text = |t: &str| Some(IntOrString::Text(t.to_owned()));
    let int = |n| Some(IntOrString::Int(n));
    let cases = [
        // replicas, surge, unavailable -> surge, unavailable
        (10, text("25%"), text("25%"), 3, 2),
        (10, None, None, 3, 2),
        (3, text("25%"), text("25%"), 1, 0),
        (1, text("25%"), text("25%"), 1, 0),
        (4, text("25%"), text("25%"), 1, 1),
        (10, int(0), int(0), 0, 1),
        (10, text("0%"), text("1%"), 0, 1),
        (10, int(2), int(20), 2, 10),
        (0, text("25%"), text("25%"), 0, 0),
        (10, text("junk"), text("100%"), 0, 10),
        (i64::from(i32::MAX), text("100%"), text("0%"), i64::from(i32::MAX), 0),
    ];
    for (replicas, max_surge, max_unavailable, surge, unavailable) in cases {
        let label = format!("{replicas} {max_surge:?} {max_unavailable:?}");
        let bounds = Bounds::new(replicas, &RollingUpdate { max_surge, max_unavailable });
        assert_eq!(bounds, Bounds { replicas, surge, unavailable }, "{label}");
    }
}

#[test]
fn the_new_set_grows_within_the_surge() {
    let bounds = Bounds { replicas: 10, surge: 3, unavailable: 2 };
    for (new, total, expected) in
        [(0, 10, 3), (3, 13, 3), (3, 11, 5), (0, 0, 10), (12, 12, 10), (0, 20, 0), (9, 9, 10)]
    {
        assert_eq!(new_size(&bounds, new, total), expected, "new {new} of {total}");
    }
}

#[test]
fn old_sets_shrink_by_what_can_be_spared() {
    let bounds = Bounds { replicas: 10, surge: 3, unavailable: 2 };
    let cases = [
        // new (wanted, available), old (wanted, available)... -> old wanted
        ((3, 0), vec![(10, 10)], vec![8]),
        ((5, 5), vec![(8, 8)], vec![3]),
        ((5, 0), vec![(8, 8)], vec![8]),
        // Pods that do not serve go first, whichever set they are of.
        ((3, 0), vec![(5, 5), (5, 3)], vec![5, 3]),
        ((3, 3), vec![(5, 0), (5, 5)], vec![0, 5]),
        // Nothing serves: all that is idle may go, down to what must be kept of the total.
        ((3, 0), vec![(10, 0)], vec![8]),
        // The status is late: it still counts pods that have been told to go.
        ((3, 3), vec![(8, 10)], vec![5]),
    ];
    for ((new, available), old, expected) in cases {
        let mut sizes: Vec<Size> = old.iter().map(|(w, a)| Size::new(*w, *a)).collect();
        shrink_old(&bounds, Size::new(new, available), &mut sizes);
        let wanted: Vec<i64> = sizes.iter().map(|s| s.wanted).collect();
        assert_eq!(wanted, expected, "new {new}/{available}, old {old:?}");
    }
}

#[test]
fn a_rescale_in_the_middle_is_proportional() {
    let share = |age, wanted, then| Share { wanted, total_max_then: then, age };
    let cases = [
        // 10 -> 15 with surge 3 and 25% kept: 13 pods become 19.
        (
            Bounds { replicas: 15, surge: 4, unavailable: 3 },
            vec![share(0, 8, 13), share(1, 5, 13)],
            vec![12, 7],
        ),
        (
            Bounds { replicas: 5, surge: 2, unavailable: 1 },
            vec![share(0, 8, 13), share(1, 5, 13)],
            vec![4, 3],
        ),
        (
            Bounds { replicas: 0, surge: 0, unavailable: 0 },
            vec![share(0, 8, 13), share(1, 5, 13)],
            vec![0, 0],
        ),
        (
            Bounds { replicas: 20, surge: 0, unavailable: 1 },
            vec![share(0, 5, 0), share(1, 5, 0)],
            vec![5, 15],
        ),
    ];
    for (bounds, shares, expected) in cases {
        assert_eq!(proportional(&bounds, &shares), expected, "{bounds:?} {shares:?}");
    }
}

/// The whole rollout of 10 replicas with 25 %/25 %: one line each time that the Deployment's controller has moved.
#[test]
fn golden_rollout() {
    let mut world = world(10, rolling(json!("25%"), json!("25%")));
    settle(&mut world);
    set_image(&mut world, "echo:2");
    let mut text = String::new();
    for _ in 0..100 {
        let moved = world.step_deployment();
        let sets = sizes(&world);
        let status = world.deployment().status;
        if moved {
            let size = |image: &str| sets.iter().find(|(i, _)| i == image).map_or(0, |(_, n)| *n);
            writeln!(
                text,
                "echo:1 {:2}  echo:2 {:2} | replicas {:2} updated {:2} available {:2} | {}",
                size("echo:1"),
                size("echo:2"),
                status.replicas,
                status.updated_replicas,
                status.available_replicas,
                reason(&world, "Progressing"),
            )
            .expect("a string takes it");
            world.settle_sets();
            continue;
        }
        let waiting = world.pods().into_iter().find(|p| !p.is_ready());
        let Some(pod) = waiting else { break };
        world.pass(1);
        world.set_ready(&pod.metadata.name, true);
        world.settle_sets();
    }
    let expected = include_str!("golden_rollout.txt");
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn first_rollout_scale_and_history() {
    let mut world = world(3, rolling(json!("25%"), json!("25%")));
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 3)]);
    let set = &world.sets()[0];
    assert_eq!(set.metadata.annotation("team"), Some("a"));
    assert_eq!(set.metadata.annotation("deployment.kubernetes.io/revision"), Some("1"));
    assert_eq!(set.metadata.labels["app"], "web");
    assert_eq!(
        set.metadata.labels["pod-template-hash"],
        world.pods()[0].metadata.labels["pod-template-hash"]
    );
    assert_eq!(reason(&world, "Progressing"), "NewReplicaSetAvailable");
    assert_eq!(reason(&world, "Available"), "MinimumReplicasAvailable");

    scale(&mut world, 5);
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 5)]);
    assert_eq!(world.deployment().status.observed_generation, world.deployment().metadata.generation);

    for image in ["echo:2", "echo:3", "echo:4"] {
        set_image(&mut world, image);
        settle(&mut world);
    }
    let images: Vec<String> = sizes(&world).into_iter().map(|(i, _)| i).collect();
    assert_eq!(images, ["echo:2", "echo:3", "echo:4"], "two old ones are kept");
    assert!(
        world
            .events
            .contains(&format!("ScalingReplicaSet: Scaled up replica set {} from 3 to 5", set.metadata.name))
    );
}

#[test]
fn a_roll_back_takes_the_old_set_with_a_new_revision() {
    let mut world = world(2, rolling(json!(1), json!(0)));
    settle(&mut world);
    set_image(&mut world, "echo:2");
    settle(&mut world);
    set_image(&mut world, "echo:1");
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 2), ("echo:2".to_owned(), 0)]);
    let set = world.sets().into_iter().find(|s| image_of(s) == "echo:1").expect("the first set");
    assert_eq!(set.metadata.annotation("deployment.kubernetes.io/revision"), Some("3"));
    assert_eq!(set.metadata.annotation("deployment.kubernetes.io/revision-history"), Some("1"));
    let revision = world.deployment().metadata.annotations["deployment.kubernetes.io/revision"].clone();
    assert_eq!(revision, "3");
}

#[test]
fn recreate_waits_for_the_old_pods() {
    let mut world = world(3, json!({"type": "Recreate"}));
    settle(&mut world);
    set_image(&mut world, "echo:2");
    assert!(world.step_deployment());
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 0)], "first the old ones go");
    world.step_deployment();
    assert_eq!(sizes(&world).len(), 1, "and while they do, nothing starts");
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 0), ("echo:2".to_owned(), 3)]);
    scale(&mut world, 1);
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 0), ("echo:2".to_owned(), 1)]);
}

#[test]
fn a_paused_one_scales_but_does_not_roll() {
    let mut world = world(2, rolling(json!(1), json!(0)));
    settle(&mut world);
    world.change(&DEPLOYMENTS, "web", Part::Main, &json!({"spec": {"paused": true}}));
    set_image(&mut world, "echo:2");
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 2)]);
    assert_eq!(reason(&world, "Progressing"), "DeploymentPaused");
    scale(&mut world, 4);
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 4)]);
    world.change(&DEPLOYMENTS, "web", Part::Main, &json!({"spec": {"paused": false}}));
    world.step_deployment();
    settle(&mut world);
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 0), ("echo:2".to_owned(), 4)]);
    assert_eq!(reason(&world, "Progressing"), "NewReplicaSetAvailable");
}

#[test]
fn a_stuck_rollout_passes_its_deadline_and_recovers() {
    let mut world = world(2, rolling(json!(1), json!(0)));
    settle(&mut world);
    set_image(&mut world, "echo:broken");
    while world.step_deployment() {
        world.settle_sets();
    }
    world.pass(300);
    world.step_deployment();
    assert_ne!(reason(&world, "Progressing"), "ProgressDeadlineExceeded");
    world.pass(302);
    world.step_deployment();
    assert_eq!(reason(&world, "Progressing"), "ProgressDeadlineExceeded");
    assert!(!world.step_deployment(), "it says so once");
    set_image(&mut world, "echo:1");
    settle(&mut world);
    assert_eq!(reason(&world, "Progressing"), "NewReplicaSetAvailable");
    assert_eq!(sizes(&world), [("echo:1".to_owned(), 2), ("echo:broken".to_owned(), 0)]);
}

#[test]
fn a_hash_collision_makes_another_name() {
    let mut world = world(1, rolling(json!(1), json!(0)));
    let name = super::new_set_name(&world.deployment());
    world.put(
        &crate::resource::kinds::REPLICA_SETS,
        json!({"metadata": {"name": name}, "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "other"}}, "template": {}}}),
    );
    settle(&mut world);
    assert_eq!(world.deployment().status.collision_count, Some(1));
    let own = world.sets().into_iter().find(|s| image_of(s) == "echo:1").expect("the new set");
    assert_ne!(own.metadata.name, name);
}

#[derive(Debug, Clone)]
enum Step {
    Deployment,
    Set(usize),
    Ready(usize),
    Image(u8),
    Scale(u8),
}

fn steps(replicas: std::ops::Range<u8>) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => Just(Step::Deployment),
        6 => (0..4usize).prop_map(Step::Set),
        8 => any::<usize>().prop_map(Step::Ready),
        1 => (0..4u8).prop_map(Step::Image),
        u32::from(replicas.len() > 1) => replicas.prop_map(Step::Scale),
    ];
    prop::collection::vec(step, 0..120)
}

fn play(world: &mut World, step: &Step) {
    match step {
        Step::Deployment => {
            world.step_deployment();
        }
        Step::Set(index) => world.step_set(*index),
        Step::Ready(index) => {
            let waiting: Vec<String> =
                world.pods().iter().filter(|p| !p.is_ready()).map(|p| p.metadata.name.clone()).collect();
            if let Some(pod) = waiting.get(index % waiting.len().max(1)) {
                world.set_ready(pod, true);
            }
        }
        Step::Image(n) => {
            let image = format!("echo:{n}");
            let current = &world.deployment().spec.template["spec"]["containers"][0]["image"];
            if *current != image.as_str() {
                set_image(world, &image);
            }
        }
        Step::Scale(n) => {
            if world.deployment().spec.replicas != i64::from(*n) {
                scale(world, i64::from(*n));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the controllers and the pods are interleaved and whatever templates are asked for: never too many
    /// pods, never too few available ones, and at the end only pods of the last template.
    #[test]
    fn a_rolling_update_keeps_its_promises(
        replicas in 1..12u8,
        surge in 0..4i64,
        unavailable in 0..4i64,
        steps in steps(0..1),
    ) {
        let mut world = world(i64::from(replicas), rolling(json!(surge), json!(unavailable)));
        settle(&mut world);
        let rolling = RollingUpdate {
            max_surge: Some(IntOrString::Int(surge)),
            max_unavailable: Some(IntOrString::Int(unavailable)),
        };
        let bounds = Bounds::new(i64::from(replicas), &rolling);
        for step in &steps {
            play(&mut world, step);
            let pods = world.pods();
            let ready = pods.iter().filter(|p| p.is_ready()).count();
            prop_assert!(i64::try_from(pods.len()).unwrap() <= bounds.total_max(), "{} pods after {step:?}", pods.len());
            prop_assert!(i64::try_from(ready).unwrap() >= bounds.available_min(), "{ready} ready after {step:?}");
        }
        settle(&mut world);
        let last = world.deployment().spec.template["spec"]["containers"][0]["image"].clone();
        for (image, size) in sizes(&world) {
            prop_assert_eq!(size, if last == image.as_str() { i64::from(replicas) } else { 0 });
        }
        prop_assert_eq!(reason(&world, "Progressing"), "NewReplicaSetAvailable");
    }

    /// With scaling thrown in, it still comes to rest at what was asked for last.
    #[test]
    fn a_rollout_converges_under_scaling(
        replicas in 0..12u8,
        surge in 0..4i64,
        unavailable in 0..4i64,
        steps in steps(0..12),
    ) {
        let mut world = world(i64::from(replicas), rolling(json!(surge), json!(unavailable)));
        for step in &steps {
            play(&mut world, step);
        }
        settle(&mut world);
        let deployment = world.deployment();
        let last = deployment.spec.template["spec"]["containers"][0]["image"].clone();
        for (image, size) in sizes(&world) {
            prop_assert_eq!(size, if last == image.as_str() { deployment.spec.replicas } else { 0 });
        }
    }
}
