// What the page asks for when it needs it, and draws when it comes.

const KEPT = 200;
const PAUSE_SECONDS = 5;

export class Arrivals {
  /** load(...args) gives a promise; onArrival() is called when one is fulfilled. */
  constructor(load, onArrival) {
    Object.assign(this, {load, onArrival});
    this.known = new Map();
    this.waiting = 0;
  }

  /** What was loaded under a key (a list), or undefined while it is on its way. */
  get(key, ...args) {
    const name = JSON.stringify(key);
    const found = this.known.get(name);
    // The newest last, so that the oldest go first.
    this.known.delete(name);
    this.known.set(name, found ?? {value: undefined});
    if (!found) {
      this.waiting++;
      this.load(...args).then((value) => {
        this.waiting--;
        this.known.set(name, {value});
        this.onArrival();
      }, () => {
        // The page says that the server does not answer; this is asked for again later.
        this.waiting--;
        setTimeout(() => {
          this.known.delete(name);
          this.onArrival();
        }, 1000 * PAUSE_SECONDS);
      });
    }
    while (this.known.size > KEPT) this.known.delete(this.known.keys().next().value);
    return this.known.get(name).value;
  }
}
