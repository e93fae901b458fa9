// Parses documents from text and files; uses neither the page nor the server.

const MAX_FILE_MB = 4;  // laying out 2 MiB of lines takes a browser 3 s
const TEXT_NAMES = ["text", "document"];  // the names that `local-rerank rank --file` accepts
const COLUMN_NAMES = [...TEXT_NAMES, "content", "passage", "body"];

/** Parse a JSON array, or else one document per line; `note` says which. */
export function parseText(text) {
  const trimmed = text.trim();
  const [array, problem] = trimmed.startsWith("[") ? parseArray(trimmed) : [null, ""];
  if (array) return { documents: array.map(textOf), note: `${count(array.length)}, from a JSON array` };
  const documents = linesOf(text);
  const note = documents.length ? `${count(documents.length)}, one per line` : "";
  return { documents, note: problem ? `${note} (not a valid JSON array: ${problem})` : note };
}

/** The inverse of `parseText`: lines if they parse to the same documents, else a JSON array. */
export function toText(documents) {
  const lines = documents.join("\n");
  const read = parseText(lines).documents;
  const same = read.length === documents.length && documents.every((text, index) => text === read[index]);
  return same ? lines : JSON.stringify(documents, null, 1);
}

/** Read a .txt, .csv, .jsonl or .json file; throws an Error for the user. */
export async function readFile(file) {
  const kind = file.name.toLowerCase().match(/\.([a-z]+)$/)?.[1];
  const read = { txt: readLines, csv: readCsv, jsonl: readJsonLines, json: readJson }[kind];
  if (!read) throw new Error(`${file.name} is not a .txt, .csv, .jsonl or .json file`);
  const size = file.size / 2 ** 20;
  if (size > MAX_FILE_MB) {
    throw new Error(`${file.name} has ${size.toFixed(1)} MiB; this page accepts at most ${MAX_FILE_MB} MiB`);
  }
  const { documents, from = "" } = read(await decode(file), file.name);
  return { documents, note: `${file.name}: ${count(documents.length)}${from}` };
}

async function decode(file) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is not UTF-8; save it as UTF-8`);
  }
}

const count = (number) => `${number} ${number === 1 ? "document" : "documents"}`;

const linesOf = (text) => text.split(/\r?\n/).filter((line) => line.trim());

const readLines = (text) => ({ documents: linesOf(text) });

function readJson(text, name) {
  const [array, problem] = parseArray(text);
  if (!array) throw new Error(`${name} is not a JSON array: ${problem}`);
  return { documents: array.map((value, index) => requireText(value, `${name}, item ${index}`)) };
}

function readJsonLines(text, name) {
  const documents = [];
  for (const [index, line] of text.split(/\r?\n/).entries()) {
    const where = `${name}, line ${index + 1}`;
    if (line.trim()) documents.push(requireText(parseLine(line, where), where));
  }
  return { documents };
}

function parseLine(line, where) {
  try {
    return JSON.parse(line);
  } catch (error) {
    throw new Error(`${where} is not JSON: ${error.message}`);
  }
}

function parseArray(text) {
  try {
    const value = JSON.parse(text);
    return Array.isArray(value) ? [value, ""] : [null, "it is not an array"];
  } catch (error) {
    return [null, error.message];
  }
}

/** The text of an object with one; other values are returned unchanged, for the server to validate. */
function textOf(value) {
  const name = TEXT_NAMES.find((name) => typeof value?.[name] === "string");
  return name ? value[name] : value;
}

function requireText(value, where) {
  const text = textOf(value);
  if (typeof text !== "string") throw new Error(`${where} is neither a string nor an object with text or document`);
  return text;
}

/** The documents are the column with a usual name, the only column, or the one with most text. */
function readCsv(text, name) {
  const rows = parseCsv(text, name).filter((row) => row.some((cell) => cell.trim()));
  if (!rows.length) return { documents: [] };
  const header = rows[0].map((cell) => cell.trim());
  const named = header.findIndex((cell) => COLUMN_NAMES.includes(cell.toLowerCase()));
  if (named < 0 && header.length === 1) return { documents: rows.map((row) => row[0]) };
  const column = named < 0 ? longestColumn(rows) : named;
  const documents = rows.slice(1).map((row) => row[column] ?? "").filter((cell) => cell.trim());
  const why = named < 0 ? ", the one with most text; call a column “text” to choose it" : "";
  return { documents, from: ` from the column “${header[column]}”${why}` };
}

function longestColumn(rows) {
  const lengths = rows[0].map((_, column) => rows.slice(1).reduce((sum, row) => sum + (row[column] ?? "").length, 0));
  return lengths.indexOf(Math.max(...lengths));
}

/** Parse CSV (RFC 4180); the separator is the most frequent of comma, semicolon and tab in the first line. */
function parseCsv(text, name) {
  const first = text.slice(0, text.search(/[\r\n]|$/));
  const [separator] = [",", ";", "\t"].sort((a, b) => first.split(b).length - first.split(a).length);
  const plain = `[^"${separator}\\r\\n][^${separator}\\r\\n]*`;
  const cell = new RegExp(`(?:"([^"]*(?:""[^"]*)*)"|(${plain}|))(${separator}|\\r\\n?|\\n|$)`, "y");
  const rows = [[]];
  while (cell.lastIndex < text.length) {
    const start = cell.lastIndex;
    const match = cell.exec(text);
    if (!match) throw new Error(`${name}, line ${lineOf(text, start)}: a quoted cell is not closed, or is followed by text`);
    rows.at(-1).push(match[1]?.replaceAll('""', '"') ?? match[2]);
    if (match[3] !== separator) rows.push([]);
  }
  return rows;
}

const lineOf = (text, position) => text.slice(0, position).split("\n").length;
