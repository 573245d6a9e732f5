//! Ring vm: other kernels, in virtual machines.
