// Numbers and ticks, as a person reads them.

/** Three significant digits; powers of ten where they are shorter. */
export function formatNumber(value) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return shortExponential(value, 2);
  return String(Number(value.toPrecision(3)));
}

function shortExponential(value, digits) {
  return value.toExponential(digits).replace(/\.?0*e/, 'e').replace('e+', 'e');
}

export function formatShare(value) {
  if (value === null || value === undefined) return '–';
  const percent = 100 * value;
  return `${Number(percent.toPrecision(percent < 10 ? 2 : 3))} %`;
}

/** The error in two digits, the value as far as they reach: 1250 ± 50. */
export function formatWithError(value, error, format = formatNumber) {
  if (value === null || value === undefined) return '–';
  if (error === null || error === undefined) return format(value);
  if (error === 0) return `${format(value)} (exact)`;
  const size = Math.max(Math.abs(value), error);
  if (format !== formatNumber || size >= 1e5 || size < 1e-3) {
    return `${format(value)} ± ${format(error)}`;
  }
  const lastDigit = Math.floor(Math.log10(error)) - 1;
  if (lastDigit >= 0) {
    const round = (number) => Math.round(number / 10 ** lastDigit) * 10 ** lastDigit;
    return `${round(value)} ± ${round(error)}`;
  }
  const decimals = Math.min(-lastDigit, 6);
  return `${value.toFixed(decimals)} ± ${error.toFixed(decimals)}`;
}

/** Three digits together. Not `toLocaleString`: that takes a tenth of a millisecond. */
export function formatStep(step) {
  const [whole, rest] = String(Number(step.toFixed(3))).split('.');
  return whole.replace(/\B(?=(\d{3})+$)/g, '\u2009') + (rest ? `.${rest}` : '');
}

/** Round numbers inside an interval, about `count` of them. */
export function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((u) => u * power >= rough) * power;
  const ticks = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + 1e-9 * unit; i++) {
    ticks.push(Number((i * unit).toPrecision(12)));
  }
  return ticks;
}

const WITHIN_A_DECADE = [[1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 6, 8]];

/** Powers of ten inside an interval, and numbers between them where they are few. */
export function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first - 1) / count));
  let ticks = [];
  for (const digits of WITHIN_A_DECADE) {
    ticks = [];
    for (let p = first; p <= last; p++) {
      if (p % every !== 0) continue;
      ticks.push(...digits.map((digit) => Number(`${digit}e${p}`)));
    }
    ticks = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    if (ticks.length >= Math.min(count, 3)) return ticks;
  }
  return ticks.length >= 2 ? ticks : linearTicks(low, high, count);
}
