// What the page asks for when it needs it, and draws when it comes.

const KEPT = 200;

export class Arrivals {
  /** load(...args) gives a promise; onArrival() is called when one is fulfilled. */
  constructor(load, onArrival) {
    Object.assign(this, {load, onArrival});
    this.known = new Map();
  }

  /** What was loaded under a key (a list), or undefined while it is on its way. */
  get(key, ...args) {
    const name = JSON.stringify(key);
    const found = this.known.get(name);
    // The newest last, so that the oldest go first.
    this.known.delete(name);
    this.known.set(name, found ?? {value: undefined});
    if (!found) {
      this.load(...args).then((value) => {
        this.known.set(name, {value});
        this.onArrival();
      }, () => this.known.delete(name));  // Asked for again with the next drawing.
    }
    while (this.known.size > KEPT) this.known.delete(this.known.keys().next().value);
    return this.known.get(name).value;
  }
}
