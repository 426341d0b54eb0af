"""The contract of parallelism: for one recorded batch every layout gives the loss, the gradients and the step of an
independent fp64 reference. Tiny models and batches, a pool of gloo ranks, and the comparison."""
