//! Ring netns: the real kernel, nodes as network namespaces. One file a subject; what is named `service_`,
//! `runtime_` or `kernel_` also runs on the kernels of ring vm; what is named `ipvs_` runs only there.

mod bad_input;
mod control_disk_full;
mod image_archive;
mod image_hostile;
mod image_import;
mod ipvs_bed;
mod ipvs_services;
mod kernel_basics;
mod kubectl;
mod load_services;
mod network_pods;
mod network_repair;
mod pod_bed;
mod pod_life;
mod pod_survival;
mod runtime_bed;
mod runtime_container;
mod runtime_exec;
mod runtime_limits;
mod runtime_logs;
mod runtime_survival;
mod service_bed;
mod service_change;
mod service_killed;
mod service_kinds;
mod service_nft;
mod service_nft_bed;
mod service_nodeport;
mod service_ops;
mod service_scenarios;
mod service_socket;
mod service_table;
mod service_upgrade;
mod service_world;
mod service_xdp;
