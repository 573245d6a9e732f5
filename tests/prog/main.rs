//! Ring prog: the eBPF programs, loaded and run on made-up packets by BPF_PROG_TEST_RUN. One file a subject.
