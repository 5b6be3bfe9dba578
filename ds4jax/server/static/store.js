// What the browser keeps: `localStorage` for good, `sessionStorage` as long as the tab. Where storage is off or full, the
// page works without.

const PREFIX = "ds4jax."; // other programs are served from this address at other times

/** The value kept under a name; null if there is none. */
export function recall(storage, name) {
  try {
    return JSON.parse(window[storage].getItem(PREFIX + name));
  } catch {
    return null;
  }
}

/** Keeps a value under a name. */
export function store(storage, name, value) {
  try {
    window[storage].setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // nothing is kept
  }
}
