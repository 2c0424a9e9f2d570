// Numbers and times as a reader likes them.

export const number = (value, digits = 0) =>
  Number(value).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;

export function seconds(value) {
  if (value === 0) return "0 ms";
  if (value < 0.0995) return `${number(value * 1000, value < 0.00995 ? 1 : 0)} ms`;
  return `${number(value, value < 9.995 ? 2 : 1)} s`;
}

export const rate = (value) => number(value, value > 0 && value < 9.95 ? 1 : 0);
