// What the figures mean, in plain words.

export const HELP = {
  loss: 'The training loss on the samples that are probed. All curvature here is of this loss.',
  hessian_trace: 'The sum of the curvature over all weights. Large means: small random changes ' +
    'of the weights cost much loss.',
  hessian_frobenius_norm: 'How large the Hessian, the matrix of second derivatives, is as a ' +
    'whole: the root of the sum of its squared eigenvalues.',
  hessian_max_eigenvalue: 'The curvature along the stiffest direction of all. It limits the ' +
    'learning rate of plain gradient descent to 2 divided by it. A hollow point is a value ' +
    'that has not converged yet.',
  hessian_preconditioned_max_eigenvalue: 'The largest curvature once the weights are scaled ' +
    'as Adam and its like scale the gradient: what limits their learning rate.',
  stability_threshold: 'The curvature above which steps of this optimizer overshoot, by its ' +
    'learning rate and momentum.',
  stability_ratio: 'The largest curvature that the optimizer sees over its stability ' +
    'threshold. Training often climbs to 100 % and stays there; far below, the learning rate ' +
    'may be raised. A hollow point is a value that has not converged yet.',
  gradient_norm: 'The length of the gradient on the probed samples.',
  gradient_noise_scale: 'How many samples a batch needs until its gradient is more signal ' +
    'than noise (McCandlish et al. 2018). Batches far below it are noisy, far above it wasteful.',
  update_ratio: 'How far all weights have moved since the last probe, divided by the number ' +
    'of steps and by their length. About 0.001 is common; steps that undo each other do not count.',
  num_matvecs: 'Products with the Hessian that a probe spends. Each costs about two gradients ' +
    'of the probed samples.',
  overhead: 'Share of the training time that probes have taken, compilation apart.',
  seconds: 'How long a probe usually takes.',
  first_seconds: 'The first probe includes the time to compile it, which is paid once.',
  map: 'One row a layer, one column a probe, brighter for more. A line through a cell marks ' +
    'a negative value. Choose a row to see its curve. Arrow keys move up and down.',
  layer: 'The chosen layer in all runs that are shown. Layers of other runs are found by ' +
    'name, whatever numbers Keras has given them.',
  density: 'How many eigenvalues of the Hessian lie where, brighter for more. Few are ' +
    'large; what lies below zero are directions in which the loss curves down.',
  histogram: 'How many weights have which curvature, at each probe, brighter for more. The axis ' +
    'counts decades on both sides of zero.',
  gradient_histogram: 'How many weights have which gradient, at each probe, brighter for more. The ' +
    'axis counts decades on both sides of zero.',
  comparison: 'The chosen figure of each layer at the last probe of both runs. Bars to the ' +
    'right: larger in this run; to the left: smaller.',
};
