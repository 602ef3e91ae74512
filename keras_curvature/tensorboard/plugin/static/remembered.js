// What follows from something that does not change is found out once.

/** The function of one or more objects, which keeps what it gave as long as they live. */
export function remembered(compute) {
  const known = new WeakMap();
  return (first, ...rest) => {
    if (!known.has(first)) {
      known.set(first, rest.length
        ? remembered((...others) => compute(first, ...others)) : compute(first));
    }
    return rest.length ? known.get(first)(...rest) : known.get(first);
  };
}
