// Scores one image by its path: node compute.js IMAGE [SOCKET]
//
// The daemon opens the image and must be allowed to: Node cannot send a descriptor. Nor does Node
// get a file's name that is not UTF-8. The exit status is 1 where the image cannot be scored, 3
// where the daemon does not answer, is busy or late.
'use strict'

const fs = require('node:fs')
const net = require('node:net')

const TIMEOUT_MS = 30000

function fail(status, code, message) {
  // A file's name may be in it, and hold anything: it stays one line and cannot steer a terminal.
  const escaped = (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0')
  fs.writeSync(2, `${code}: ${message.replace(/[^ -~]/g, escaped)}\n`)
  process.exit(status)
}

function show(line) {
  let reply = null
  try {
    reply = JSON.parse(line)
  } catch {
    // which is said below
  }
  const { code, message, retryable } = reply?.error ?? {}
  if (code) fail(retryable || code === 'timeout' ? 3 : 1, code, String(message))
  const scores = reply?.scores
  const isWhole = Array.isArray(scores) && scores.length > 0 && scores.every(Number.isFinite)
  if (!isWhole || reply.error) fail(1, 'bad_reply', 'neither scores nor an error')
  try {
    fs.writeSync(1, scores.map((score) => score.toFixed(6)).join(',') + '\n')
  } catch (error) {
    fail(1, 'internal', error.message)
  }
  process.exit(0)
}

const [image, named, ...others] = process.argv.slice(2)
if (image === undefined || others.length > 0) {
  fs.writeSync(2, 'usage: node compute.js IMAGE [SOCKET]\n')
  process.exit(2)
}
const path = image.startsWith('/') ? image : `${process.cwd()}/${image}`
const socket = named ?? (process.env.SWIPR_SOCKET || '/run/swipr/swipr.sock')
setTimeout(() => fail(3, 'timeout', `${socket}: no answer within 30 s`), TIMEOUT_MS)

const connection = net.createConnection({ path: socket })
let received = ''
connection.setEncoding('utf8')
connection.on('error', (error) => fail(3, 'cannot_connect', error.message))
connection.on('end', () => fail(3, 'cannot_connect', `${socket}: no answer`))
connection.on('data', (data) => {
  received += data
  if (received.endsWith('\n')) show(received)
})
connection.write(JSON.stringify({ path, timeout_ms: TIMEOUT_MS }) + '\n')
